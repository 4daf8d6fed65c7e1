"""Supervised fine-tuning in plain PyTorch.

    python train_sft.py                                      # Qwen/Qwen2-0.5B-Instruct, data/sft.jsonl -> sft.pt
    python train_sft.py --ckpt base --data chats.jsonl --out sft
    torchrun --nproc-per-node 8 train_sft.py ...             # the same steps on 8 ranks
    torchrun --nproc-per-node 8 train_sft.py ... --shard     # a model too large for one rank

Data: {"messages": [{"role", "content"}, ...]} lines, or another shape of docs/data-formats.md. In messages, every
assistant turn is supervised.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
from core.files import check_arguments, cli
from training.flags import parse_sft_args as parse_args

if __name__ == "__main__":
    check_arguments(parse_args)  # before torch is loaded, so that --help and wrong flags are answered at once

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core.conversations import sft_conversations
from core.distributed import run_distributed
from core.records import read_records
from model import Qwen2
from training.examples import count_supervised, encode_chats, held_out_lines
from training.logps import supervised_logps
from training.run import (
    Run,
    end_step,
    eval_due,
    eval_logps,
    finish_run,
    progress,
    run_identity,
    start_run,
    stop_run,
    warn_of_added_parameters,
)
from training.setup import (
    Setup,
    open_checkpoint,
    plan_steps,
    plan_warmup,
    prepare_blocks,
    setup_ranks,
    shuffled_order,
)
from training.step import lr_at, micro_batches, optimizer_step, record_skip, seed_step

# ---------------------------------------------------------------------------------------------------------------------
# The loss


def sft_loss(logps: Tensor, n_supervised: int) -> Tensor:
    """Cross-entropy per supervised token of the whole step, in nats.

    logps: (N,) log-probabilities of the supervised tokens of one micro-batch, example by example, left to right.
    n_supervised: supervised tokens of the whole step, over all micro-batches and ranks.

    The losses of the micro-batches add up to the loss of the step, so the result does not depend on how the step is
    split into micro-batches. A mean over each micro-batch would break this, as would any other computation across the
    examples of a micro-batch. The loss of an example may use only that example and the fields of StepBatch.
    """
    return -logps.sum() / n_supervised


@dataclass(frozen=True)
class StepBatch:
    """The data of one optimizer step, the same on all ranks."""

    step: int  # 0 .. n_steps - 1
    n_steps: int
    indices: list[int]  # the step's examples, as indices into the training data
    examples: list  # (ids, supervised) of each
    n_supervised: int  # supervised tokens of all examples
    prepared: object = None  # what `prepare` returned


def micro_loss(model: Qwen2, batch: StepBatch, micro: list[int]) -> Tensor:
    """The loss of one micro-batch. micro: indices into batch.examples."""
    logps, _ = supervised_logps(model, [batch.examples[i] for i in micro])  # (N,), ordered as in sft_loss
    return sft_loss(logps, batch.n_supervised)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def make_batch(setup: Setup, step: int, indices: list[int]) -> StepBatch:
    examples = [setup.examples[i] for i in indices]
    return StepBatch(step, len(setup.steps), indices, examples, count_supervised(examples), setup.prepared)


def train(run: Run, setup: Setup, held_out: list, loss: Callable, choose: Callable | None) -> bool:
    """Runs all remaining steps. -> True, or False if SIGTERM or Ctrl-C stopped the run (it is then already saved).

    loss, choose: see main.
    """
    model, args = run.model, run.args
    if run.pending and not end_step(run, with_eval(run, run.pending, held_out)):  # an interrupted evaluation
        return False
    for step in (bar := progress(run, "sft")):
        start = time.time()
        seed_step(run, step)
        batch = make_batch(setup, step, setup.steps[step])
        if choose:
            batch = make_batch(setup, step, [batch.indices[i] for i in choose(model, batch)])
        lengths = [len(ids) for ids, _ in batch.examples]

        step_loss = torch.zeros((), device=model.device)
        for micro in micro_batches(run, lengths):
            part = loss(model, batch, micro)
            part.backward()
            step_loss += part.detach()
        lr = lr_at(step, run.total, args.lr, args.warmup, args.schedule)
        result = optimizer_step(run, lr, step_loss)
        if result.status == "stop":
            stop_run(run, step)
            return False

        record = {"step": step + 1, "loss": result.stats.item(), "lr": lr, "grad_norm": result.grad_norm}
        record |= {"tokens": sum(lengths), "tokens_per_second": sum(lengths) / (time.time() - start)}
        if result.status == "skip":
            record |= record_skip(run, step + 1, batch.examples, [setup.places[i] for i in batch.indices])
        if not end_step(run, with_eval(run, record, held_out)):
            return False
        bar.set_postfix(loss=f"{record['loss']:.4f}")
    return True


def with_eval(run: Run, record: dict, held_out: list) -> dict | None:
    """Adds the held-out loss to the step's log record if an evaluation is due. None if the run was stopped in it."""
    if not held_out or not eval_due(run, record):
        return record
    logps = eval_logps(run, record, held_out)
    if logps is None:
        return None
    cross_entropy = -logps.sum().item() / count_supervised(held_out)  # even if another loss is trained
    return record | {"eval_loss": cross_entropy}


# ---------------------------------------------------------------------------------------------------------------------
# The command. Its flags are in training/flags.py.


def main(
    args: argparse.Namespace | None = None,
    *,
    loss: Callable = micro_loss,
    parse: Callable = sft_conversations,
    prepare: Callable | None = None,
    choose: Callable | None = None,
    before_save: Callable | None = None,
) -> None:
    """Trains a model. args: from parse_args; None parses the command line. The other arguments change the method.

    loss(model, batch, micro) -> scalar: replaces micro_loss, not sft_loss. See sft_loss for what it may use.

    parse(record, where, last_turn_only) -> conversations of --data: replaces core.conversations.sft_conversations.

    prepare(setup): called after the model is loaded and before the optimizer exists. It may add modules and buffers to
    setup.model, freeze parameters, or register hooks. All ranks then start from rank 0's values, and OUT.run/ saves
    the added parameters and buffers too. It may set further arguments in args, which a resumed run must then share.
    The loss and `choose` find what it returns as batch.prepared.

    choose(model, batch) -> indices into batch.examples: the examples to train on in this step, the same on all ranks.

    before_save(model): called once, before OUT is written. Afterwards the model must have the checkpoint's parameters
    and no others (fold a LoRA here).
    """
    args = args or parse_args()
    ranks = setup_ranks(args)
    turns = {"last_turn_only": args.last_turn_only}
    records = read_records(args.data, functools.partial(parse, **turns))
    eval_records = read_records(args.eval_data, functools.partial(sft_conversations, **turns)) if args.eval_data else []
    model, tokenizer, ckpt = open_checkpoint(args, ranks)
    examples, places, cuts = encode_chats(records, tokenizer, args.max_len)
    held_out, _, held_out_cuts = encode_chats(eval_records, tokenizer, args.max_len)
    order = None if args.no_shuffle else shuffled_order(len(examples), args.seed)
    steps = plan_steps(len(examples), args.batch_size, args.epochs, args.max_steps, order=order)
    setup = Setup(args, ranks, model, tokenizer, ckpt, examples, places, steps, records)
    plan_warmup(args, steps)

    if prepare:
        setup.prepared = prepare(setup)
    identity = run_identity(args, examples, ckpt.fingerprint())
    if not before_save:
        warn_of_added_parameters(setup)
    prepare_blocks(model, args, ([len(examples[i][0]) for i in step] for step in steps), ranks)
    run = start_run(setup, identity)
    if run is None or not train(run, setup, held_out, loss, choose):
        return
    if before_save:
        before_save(model)
    dropped = f"{len(records) - len(examples)} dropped (nothing supervised within {args.max_len} tokens)"
    facts = [f"{len(examples)} examples, {dropped}", *cuts.lines(len(examples), args.max_len)]
    facts += held_out_lines(len(eval_records), len(held_out), held_out_cuts, args.max_len)
    next_commands = (
        ["python", "train_kto.py", "--ckpt", args.out],
        ["python", "eval.py", "--ckpt", args.ckpt, args.out, "--tasks", "gsm8k"],
    )
    finish_run(run, facts, next_commands)


if __name__ == "__main__":
    cli(run_distributed(main))
