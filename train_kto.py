"""KTO, alignment from desirable and undesirable completions (arXiv 2402.01306), in plain PyTorch.

    python train_kto.py --ckpt sft.pt                                 # data/kto.jsonl -> sft-kto.pt
    python train_kto.py --ckpt sft --data feedback.jsonl --out aligned
    torchrun --nproc-per-node 8 train_kto.py ...                      # the same steps on 8 ranks
    torchrun --nproc-per-node 8 train_kto.py ... --shard              # a model too large for one rank

Data: {"prompt", "completion", "label"} lines, or another shape of docs/data-formats.md. The reference is the model of
--ref, or else the model before training. Its log-probabilities are computed once, before the first step, and cached in
a file for later runs.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
from core.files import check_arguments, cli, print0
from training.flags import parse_kto_args as parse_args

if __name__ == "__main__":
    check_arguments(parse_args)  # before torch is loaded, so that --help and wrong flags are answered at once

import argparse
import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from core.conversations import kto_examples
from core.devices import to_device
from core.distributed import is_sharded, run_distributed
from core.records import read_records
from training.examples import held_out_lines
from training.feedback import Feedback, kto_metrics, label_weights, plan_feedback, weight_advice
from training.logps import example_logps, sequence_logps
from training.reference import open_reference, reference_logps
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
from training.setup import Setup, open_checkpoint, plan_warmup, prepare_blocks, setup_ranks
from training.step import lr_at, micro_batches, optimizer_step, record_skip, seed_step

# ---------------------------------------------------------------------------------------------------------------------
# The loss


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    kl: Tensor,
    desirable: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor]:
    """KTO's loss per example and its implicit reward (arXiv 2402.01306, Eq. 7 and 8). -> (losses (n,), rewards (n,)).

    policy_logps, ref_logps: (n,) log-probabilities of the completions, summed over their tokens, in nats.
    kl: the reference point z0 >= 0, in nats; no gradient flows into it. desirable: (n,) bool.

        r = policy_logps - ref_logps        loss = w_D (1 - sigmoid(beta (r - z0)))  desirable
        reward = beta r                            w_U (1 - sigmoid(beta (z0 - r)))  undesirable

    Called once per micro-batch; its n examples may be any part of the step's. The loss of an example may depend only
    on that example and on kl. Otherwise the result would depend on --micro-tokens and on the number of ranks. Compute
    anything that needs the whole step in `train`, next to kl.
    """
    r, kl = policy_logps - ref_logps, torch.as_tensor(kl).detach()
    gain = torch.where(desirable, r - kl, kl - r)
    weight = torch.full_like(r, undesirable_weight).masked_fill(desirable, desirable_weight)
    return weight * (1 - torch.sigmoid(beta * gain)), beta * r.detach()


def kl_estimate(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """z0: the mean log-ratio of the step's KL pairs, clamped at 0 after the mean. (n,), (n,) -> scalar; 0 if n is 0."""
    return ((policy_logps - ref_logps).sum() / max(1, len(ref_logps))).clamp(min=0)


def kl_pairs(indices: list[int]) -> list[tuple[int, int]]:
    """The mismatched pairs of a step: the prompt of i with the completion of the example before it, cyclically."""
    return [(i, indices[k - 1]) for k, i in enumerate(indices)]


def all_pairs(indices: list[int]) -> list[tuple[int, int]]:
    """The matched pairs of a step (i, i), then its KL pairs."""
    return [(i, i) for i in indices] + kl_pairs(indices)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run, data: Feedback, held_out: Feedback | None, loss: Callable) -> bool:
    """Runs all remaining steps. -> True, or False if SIGTERM or Ctrl-C stopped the run (it is then already saved).

    loss: kto_loss with its last three arguments bound.
    """
    model, args, device = run.model, run.args, run.ranks.device
    if run.pending and not end_step(run, with_eval(run, run.pending, held_out, loss)):  # an interrupted evaluation
        return False
    for step in (bar := progress(run, "kto")):
        start = time.time()
        seed_step(run, step)
        indices = data.steps[step]
        labels = torch.tensor([data.rows[i].label for i in indices])  # (n,)
        desirable = to_device(labels, device)

        # z0 from the KL pairs, without gradient. After a stop signal, replicas skip the rest of this pass
        mismatched = [data.sequence(*pair) for pair in kl_pairs(indices)]
        kl_logps = sequence_logps(model, mismatched, args.micro_tokens, run.ranks, heed_stop=not is_sharded(model))
        kl = kl_estimate(kl_logps, to_device([data.ref[pair] for pair in kl_pairs(indices)], device))

        # The loss from the matched pairs
        matched = [data.sequence(i, i) for i in indices]
        ref_logps = to_device([data.ref[i, i] for i in indices], device)  # (n,)
        # Rows: losses, rewards, log-probabilities, z0. z0 is included so that an infinite z0 skips the step: the
        # sigmoid turns it into a finite loss
        step_stats = torch.zeros(4, len(indices), device=device)
        for micro in micro_batches(run, [len(ids) for ids, _ in matched]):
            logps = example_logps(model, [matched[k] for k in micro])  # (len(micro),)
            index = to_device(torch.tensor(micro, dtype=torch.long), device)
            losses, rewards = loss(logps, ref_logps[index], kl, desirable[index])
            (losses.sum() / len(indices)).backward()
            step_stats[:, index] = torch.stack((losses.detach(), rewards, logps.detach(), kl.expand(len(micro))))
        lr = lr_at(step, run.total, args.lr, args.warmup, args.schedule)
        result = optimizer_step(run, lr, step_stats)
        if result.status == "stop":
            stop_run(run, step)
            return False

        losses, rewards, logps, z0 = result.stats
        metrics = kto_metrics(losses, rewards, logps, labels, z0[0])
        tokens = sum(len(ids) for ids, _ in matched + mismatched)
        record = {"step": step + 1, "loss": metrics["loss"], "lr": lr, "grad_norm": result.grad_norm}
        record |= {"tokens": tokens, "tokens_per_second": tokens / (time.time() - start)} | metrics
        if result.status == "skip":
            pairs = all_pairs(indices)
            names = [data.pair_name(*pair) for pair in pairs]
            bad_refs = [k for k, pair in enumerate(pairs) if not math.isfinite(data.ref[pair])]
            record |= record_skip(run, step + 1, matched + mismatched, names, bad_refs)
        if not end_step(run, with_eval(run, record, held_out, loss)):
            return False
        bar.set_postfix(loss=f"{record['loss']:.4f}", kl=f"{record['kl']:.3f}")
    return True


def with_eval(run: Run, record: dict, held_out: Feedback | None, loss: Callable) -> dict | None:
    """Adds the held-out metrics to the step's log record if an evaluation is due. None if the run was stopped in it."""
    if not held_out or not eval_due(run, record):
        return record
    (indices,) = held_out.steps
    pairs, n = all_pairs(indices), len(indices)
    logps = eval_logps(run, record, [held_out.sequence(*pair) for pair in pairs])
    if logps is None:
        return None
    logps, ref = logps.cpu(), torch.tensor([held_out.ref[pair] for pair in pairs])  # (2n,), the first n matched
    desirable = torch.tensor([held_out.rows[i].label for i in indices])
    kl = kl_estimate(logps[n:], ref[n:])
    losses, rewards = loss(logps[:n], ref[:n], kl, desirable)
    metrics = kto_metrics(losses, rewards, logps[:n], desirable, kl)
    return record | {f"eval_{k}": v for k, v in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The command. Its flags are in training/flags.py.


def main(
    args: argparse.Namespace | None = None,
    *,
    loss: Callable = kto_loss,
    prepare: Callable | None = None,
    before_save: Callable | None = None,
) -> None:
    """Trains a model. args: from parse_args; None parses the command line. The other arguments change the method.

    loss: a replacement for kto_loss, called with the same arguments.
    prepare(setup), before_save(model): as in train_sft.main. The reference pass comes before prepare.
    """
    args = args or parse_args()
    ranks = setup_ranks(args)
    records = read_records(args.data, kto_examples)
    eval_records = read_records(args.eval_data, kto_examples) if args.eval_data else []
    model, tokenizer, ckpt = open_checkpoint(args, ranks)
    setup = Setup(args, ranks, model, tokenizer, ckpt)
    data = plan_feedback(records, args.data, setup, kl_pairs)
    held_out = plan_feedback(eval_records, args.eval_data, setup, kl_pairs, held_out=True) if eval_records else None
    rows, steps = data.rows, data.steps
    setup.examples, setup.places, setup.steps = rows, data.places, steps

    n, n_d = len(rows), sum(row.label for row in rows)
    w_d, w_u = label_weights(args, n_d, n - n_d)
    for text in weight_advice(n_d, n - n_d, w_d, w_u):
        print0(f"warning: {text}")
    plan_warmup(args, steps)

    fingerprint = ckpt.fingerprint()
    reference = open_reference(setup, fingerprint)
    pairs = {pair for step in steps for pair in all_pairs(step)}
    data.ref, computed = reference_logps(reference, sorted(pairs), data.sequence)
    if held_out:
        held_pairs = all_pairs(held_out.steps[0])
        held_out.ref, _ = reference_logps(reference, held_pairs, held_out.sequence)

    if prepare:
        prepare(setup)
    identity = run_identity(args, rows, fingerprint) | {"the reference": reference.fingerprint}
    if not before_save:
        warn_of_added_parameters(setup)
    lengths = [min(args.max_len, len(row.prompt) + len(row.completion)) for row in rows]
    prepare_blocks(model, args, ([lengths[i] for i in step] for step in steps), ranks)
    run = start_run(setup, identity)
    loss = functools.partial(loss, beta=args.beta, desirable_weight=w_d, undesirable_weight=w_u)
    if run is None or not train(run, data, held_out, loss):
        return
    if before_save:
        before_save(model)
    dropped = f"{len(records) - n} dropped (the prompt fills {args.max_len} tokens)"
    facts = [f"{n} examples, {n_d} of them desirable, {dropped}", *data.cuts.lines(n, args.max_len)]
    if held_out:
        facts += held_out_lines(len(eval_records), len(held_out.rows), held_out.cuts, args.max_len)
    cached = f"{computed} of {len(pairs)} reference log-probabilities computed, kept in {reference.cache}"
    facts.append(f"label weights {w_d:.4g} (desirable) and {w_u:.4g} (undesirable); {cached}")
    finish_run(run, facts, [["python", "eval.py", "--ckpt", args.ckpt, args.out, "--tasks", "gsm8k"]])


if __name__ == "__main__":
    cli(run_distributed(main))
