"""One optimizer step: learning rate, micro-batches, gradient clipping, AdamW, and steps whose numbers are not finite.

Shared training utilities. To change the method, edit train_sft.py or train_kto.py, not this file.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.distributed import STOP, is_sharded, rank_micro_batches, sum_over_ranks
from model import Qwen2
from training.logps import example_logps, sequence_logps
from training.saves import Run
from training.setup import seed_all


def make_optimizer(model: Qwen2, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101). Matrices decay; biases and norms do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=True)


def lr_at(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    """The learning rate of step 0 .. total - 1, as in transformers' get_scheduler: step 0 of a warmup has rate 0."""
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def seed_step(run: Run, step: int) -> None:
    """Makes the random numbers of a step (dropout, say) follow from --seed, the step and the rank alone.

    So a resumed run draws what the uninterrupted one would have drawn, and no generator state needs to be saved.
    """
    seed_all(run.args.seed, step, run.ranks.rank)


def micro_batches(run: Run, lengths: list[int]) -> Iterator[list[int]]:
    """Yields this rank's micro-batches of a step as lists of indices. Each must be run backward once.

    lengths: tokens of each of the step's examples. Ends early after SIGTERM or Ctrl-C.
    """
    ranks, sharded = run.ranks, is_sharded(run.model)
    micros = rank_micro_batches(lengths, run.args.micro_tokens, ranks.rank, ranks.world, sharded)
    run.start_sync(len(micros))
    for micro in micros:
        if STOP["asked"] and not sharded:  # sharded ranks would wait for this one in their next layer
            return
        yield micro


def clip_gradients(model: Qwen2, clip: float) -> Tensor:
    """Scales the gradients down to the norm `clip` (0: leaves them). -> their norm before, a scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
    return (norm.full_tensor() if is_sharded(model) else norm).to(model.device)


def clear_gradients(run: Run) -> None:
    run.optimizer.zero_grad(set_to_none=run.ranks.world == 1 or is_sharded(run.model))  # replicas' gradients are views


@dataclass(frozen=True)
class StepResult:
    """What optimizer_step did, the same on all ranks."""

    status: str  # "step", "skip" or "stop"
    stats: Tensor  # the step's statistics summed over the ranks, on the CPU
    grad_norm: float  # before clipping


def optimizer_step(run: Run, lr: float, stats: Tensor) -> StepResult:
    """Ends a step: sums gradients and statistics over the ranks, clips, updates the weights, clears the gradients.

    stats: fp32, any shape: this rank's statistics of the step, with zeros where another rank fills them in. Status
    "skip" means that one of these numbers is not finite, "stop" that SIGTERM or Ctrl-C reached some rank. Both leave
    the weights untouched. Every rank sees the same sums, so all agree.
    """
    run.wait_sync()
    norm = clip_gradients(run.model, run.args.clip)
    numbers = sum_over_ranks(torch.cat((stats.flatten(), stats.new_full((1,), float(STOP["asked"])))))
    numbers = torch.cat((numbers, norm[None])).cpu()  # the only time that the step waits for the device
    status = "stop" if numbers[-2] > 0 else "step" if numbers.isfinite().all() else "skip"
    if status == "step":
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    clear_gradients(run)
    return StepResult(status, numbers[:-2].view(stats.shape), numbers[-1].item())


# ---------------------------------------------------------------------------------------------------------------------
# Steps whose numbers are not finite


def record_skip(run: Run, step: int, examples: list, places: list[str], known: Iterable[int] = ()) -> dict:
    """Notes a skipped step. -> entries for its log record.

    examples: those of the step. places: "file:line" of each. known: indices of examples known to be at fault.
    """
    names = [places[i] for i in (list(known) or find_nonfinite_examples(run, examples))[:5]]
    run.skips.append((step, names))
    return {"skipped": len(run.skips), "offending": names}


def find_nonfinite_examples(run: Run, examples: list) -> list[int]:
    """Indices of the examples whose own log-probability, or else whose own gradient, is not finite."""
    logps = sequence_logps(run.model, examples, run.args.micro_tokens, run.ranks)
    bad = [i for i, finite in enumerate(logps.isfinite().tolist()) if not finite]
    for i in range(len(examples)) if not bad else []:  # every rank runs all of them, so that all agree; a rare case
        example_logps(run.model, [examples[i]]).sum().backward()
        bad += [] if clip_gradients(run.model, 0).isfinite() else [i]
        clear_gradients(run)
    return bad
