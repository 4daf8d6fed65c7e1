"""One optimizer step: learning rate, micro-batches, gradient clipping, AdamW, and steps that are not finite.

Shared training utilities. To change the method, edit train_sft.py or train_kto.py, not this file.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.casts import cast_once
from core.distributed import STOP, is_sharded, rank_micro_batches, sum_over_ranks
from model import Qwen2
from training.logps import example_logps, sequence_logps
from training.setup import seed_all
from training.state import Run


def make_optimizer(model: Qwen2, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101). Weight decay applies to matrices, not to vectors (biases, norms) and scalars."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=True)


def lr_at(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    """The learning rate of step 0 .. total - 1. With a warmup, step 0 has rate 0.

    As in transformers' get_scheduler; "constant" is its "constant_with_warmup".
    """
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def seed_step(run: Run, step: int) -> None:
    """Seeds the random numbers of a step (such as dropout) from --seed, the step and the rank.

    So a resumed run draws the same numbers as an uninterrupted one, and no generator state is saved.
    """
    seed_all(run.args.seed, step, run.ranks.rank)


def micro_batches(run: Run, lengths: list[int]) -> Iterator[list[int]]:
    """Yields this rank's micro-batches of a step, as lists of indices. Run exactly one backward for each.

    lengths: tokens of each of the step's examples. Ends early after SIGTERM or Ctrl-C.
    """
    sharded = is_sharded(run.model)
    micros = rank_micro_batches(lengths, run.args.micro_tokens, run.ranks, sharded)
    run.start_sync(len(micros))
    with cast_once(run.model.casts):
        for micro in micros:
            if STOP["asked"] and not sharded:  # a sharded rank cannot stop alone: the others would wait for it
                return
            yield micro


def clip_gradients(model: Qwen2, clip: float) -> Tensor:
    """Scales the gradients down to the norm `clip` (0: no clipping). -> the norm before clipping, a scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
    return (norm.full_tensor() if is_sharded(model) else norm).to(model.device)


def clear_gradients(run: Run) -> None:
    run.optimizer.zero_grad(set_to_none=run.ranks.world == 1 or is_sharded(run.model))  # replicas' gradients are views


@dataclass(frozen=True)
class StepResult:
    """The outcome of optimizer_step, the same on all ranks."""

    status: str  # "step", "skip" or "stop"
    stats: Tensor  # the statistics of the step, summed over the ranks, on the CPU
    grad_norm: float  # before clipping


def optimizer_step(run: Run, lr: float, stats: Tensor) -> StepResult:
    """Ends a step: sums gradients and statistics over the ranks, clips, updates the weights, clears the gradients.

    stats: fp32, any shape: this rank's statistics of the step, 0 for examples of other ranks.

    Status "skip": a statistic or the gradient norm is not finite. "stop": some rank received SIGTERM or Ctrl-C. Both
    leave the weights unchanged. All ranks see the same sums, so all get the same status.
    """
    run.wait_sync()
    norm = clip_gradients(run.model, run.args.clip)
    numbers = sum_over_ranks(torch.cat((stats.flatten(), stats.new_full((1,), float(STOP["asked"])))))
    numbers = torch.cat((numbers, norm[None])).cpu()  # the only point where the step waits for the GPU
    status = "stop" if numbers[-2] > 0 else "step" if numbers.isfinite().all() else "skip"
    if status == "step":
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    clear_gradients(run)
    return StepResult(status, numbers[:-2].view(stats.shape), numbers[-1].item())


# ---------------------------------------------------------------------------------------------------------------------
# Steps with a loss or gradient that is not finite


def record_skip(run: Run, step: int, examples: list, places: list[str], offending: Iterable[int] = ()) -> dict:
    """Records a skipped step in run.skips. -> entries for its log record.

    examples: the step's examples. places: "file:line" of each. offending: their indices, if the caller knows them.
    """
    names = [places[i] for i in (list(offending) or find_nonfinite_examples(run, examples))[:5]]
    run.skips.append((step, names))
    return {"skipped": len(run.skips), "offending": names}


def find_nonfinite_examples(run: Run, examples: list) -> list[int]:
    """Indices of examples whose log-probability is not finite, or else of those whose gradient is not finite."""
    logps = sequence_logps(run.model, examples, run.args.micro_tokens, run.ranks)
    bad = [i for i, finite in enumerate(logps.isfinite().tolist()) if not finite]
    if bad:
        return bad
    for i, example in enumerate(examples):  # rare; every rank runs all examples, so all agree
        example_logps(run.model, [example]).sum().backward()
        if not clip_gradients(run.model, 0).isfinite():
            bad.append(i)
        clear_gradients(run)
    return bad
