"""Supervised fine-tuning on plain PyTorch.

python train_sft.py --ckpt Qwen/Qwen2-0.5B-Instruct --data sft.jsonl --out sft.pt
torchrun --nproc-per-node 8 train_sft.py ...                                          # the same step on 8 ranks
torchrun --nproc-per-node 8 train_sft.py ... --shard                                  # of a model too large for one
"""

import functools
import time

import torch
from tqdm import tqdm

from core.conversations import sft_conversations
from core.distributed import run_distributed
from core.files import InputError, cli
from core.flags import Parser
from core.records import read_records
from training.examples import count_supervised, encode_chats
from training.logps import supervised_logps
from training.run import end_step, eval_logps, finish_run, run_identity, start_run, stop_run
from training.setup import (
    add_training_flags,
    checkpoint_activations,
    open_checkpoint,
    plan_steps,
    schedule_advice,
    setup_ranks,
    shuffled_order,
)
from training.step import lr_at, micro_batches, optimizer_step, record_skip

# ---------------------------------------------------------------------------------------------------------------------
# The maths


def sft_loss(logps, n_supervised):
    """Cross-entropy per supervised token of the whole step.

    logps: (N,) log-probabilities of the supervised tokens of any part of the step's examples. n_supervised: how many the step
    has, over all micro-batches and ranks. The losses of the parts add up to the loss of the step, so the result does not
    depend on how the step was cut (a mean of the parts' means would).
    """
    return -logps.sum() / n_supervised


def main():
    p = Parser(description=__doc__.split("\n\n")[0])
    add_training_flags(p, epochs=3, batch_size=1000, lr=1e-6)  # the paper's
    p.add_argument(
        "--last-turn-only", action="store_true", help="learn the last reply of a conversation, not all of them"
    )
    a = p.parse_args()
    rank, world, device = setup_ranks(a)

    parse = functools.partial(sft_conversations, last_turn_only=a.last_turn_only)
    records = read_records(a.data, parse)
    eval_records = read_records(a.eval_data, parse) if a.eval_data else []
    model, tokenizer, ckpt = open_checkpoint(a.ckpt, a, device)
    examples, places = encode_chats(records, tokenizer, a.max_len)
    eval_examples, _ = encode_chats(eval_records, tokenizer, a.max_len)
    if not examples:
        raise InputError(f"{', '.join(a.data)}: no example has a supervised token within --max-len {a.max_len}")
    if a.eval_data and not eval_examples:
        raise InputError(f"{', '.join(a.eval_data)}: no example has a supervised token within --max-len {a.max_len}")
    steps = plan_steps(
        len(examples),
        a.batch_size,
        a.epochs,
        a.max_steps,
        order=None if a.no_shuffle else shuffled_order(len(examples), a.seed),
    )
    if rank == 0:
        for text in schedule_advice(a, steps):
            print(f"warning: {text}")

    checkpoint_activations(model, a, ([len(examples[i][0]) for i in step] for step in steps), rank, world)
    run = start_run(a, rank, world, model, ckpt, run_identity(a, examples, ckpt.fingerprint()), len(steps))

    def evaluated(record):
        """A step's entry of the log, with the held-out loss where that is due."""
        logps = eval_logps(run, record, eval_examples)
        if logps is None:
            return record
        return record | {
            "eval_loss": -logps.sum().item() / count_supervised(eval_examples)
        }  # cross-entropy, whatever sft_loss may become

    if run.pending:
        end_step(run, evaluated(run.pending))
    bar = tqdm(total=len(steps), initial=run.done, desc="sft", unit="step", disable=True if rank else None)
    for step in range(run.done, len(steps)):
        t0 = time.time()
        batch = [examples[i] for i in steps[step]]
        n_supervised = count_supervised(batch)
        lengths = [len(ids) for ids, _ in batch]

        loss = torch.zeros((), device=device)
        for micro in micro_batches(run, lengths):
            logps, _ = supervised_logps(model, [batch[i] for i in micro])  # (N,), one per supervised token
            part = sft_loss(logps, n_supervised)
            part.backward()
            loss += part.detach()
        lr = lr_at(step, len(steps), a.lr, a.warmup, a.schedule)
        verdict, loss, grad_norm = optimizer_step(run, lr, loss)
        if verdict == "stop":
            return stop_run(run, step)

        record = {"step": step + 1, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm}
        record |= {"tokens": sum(lengths), "tokens_per_second": sum(lengths) / (time.time() - t0)}
        if verdict == "skip":
            record |= record_skip(run, step + 1, batch, [places[i] for i in steps[step]])
        end_step(run, evaluated(record))
        bar.set_postfix(loss=f"{record['loss']:.4f}")
        bar.update()
    bar.close()
    dropped = len(records) - len(examples)
    finish_run(run, [f"{len(examples)} examples, {dropped} dropped: nothing supervised within {a.max_len} tokens"])


if __name__ == "__main__":
    cli(run_distributed(main))
