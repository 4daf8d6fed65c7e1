"""What both training loops share and nobody edits to do research: models, batches, optimizer, schedule, flags.

Plain functions. Files, saves and resuming are in training/run.py; ranks, sharding and signals in core/distributed.py; the memory of a step in
training/memory.py. The loops themselves stand in train_sft.py and train_kto.py.
"""

import math

import torch
import torch.utils.checkpoint

from core.distributed import STOP, is_sharded, rank_micro_batches, sum_over_ranks
from training.logps import example_logps, sequence_logps

# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


def lr_at(step, total, peak, warmup, schedule):
    """The learning rate of step 0 .. total - 1, as transformers' get_scheduler has it: step 0 of a warmup has rate 0."""
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def micro_batches(run, lengths):
    """Yields this rank's micro-batches of a step, each of which must be run backward. Ends early after SIGTERM."""
    micros = rank_micro_batches(lengths, run.a.micro_tokens, run.rank, run.world, is_sharded(run.model))
    run.expect(len(micros))
    for micro in micros:
        if STOP["asked"] and not is_sharded(run.model):  # sharded ranks would wait for this one in their next layer
            return
        yield micro


def clip_gradients(model, clip):
    """Scales the gradients down to the norm `clip` (0: leaves them). -> their norm before, a scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
    return (norm.full_tensor() if is_sharded(model) else norm).to(model.device)


def clear_gradients(run):
    run.optimizer.zero_grad(set_to_none=run.world == 1 or is_sharded(run.model))  # replicas' gradients are views


def optimizer_step(run, lr, seen):
    """Ends a step: sums gradients and `seen` over the ranks, clips, updates the weights, clears.

    seen: fp32, any shape; what this rank found in the step, zeros where another did. -> (verdict, seen summed, on the
    CPU, the gradient's norm before clipping). Verdict: "step"; "skip" if any of these numbers is not finite; "stop" if
    SIGTERM came to any rank. The last two change nothing. All ranks decide by the same sums, so they decide alike.
    """
    run.finish()
    norm = clip_gradients(run.model, run.a.clip)
    numbers = sum_over_ranks(torch.cat((seen.flatten(), seen.new_full((1,), float(STOP["asked"])))))
    numbers = torch.cat((numbers, norm[None])).cpu()  # the step's only wait for the device
    verdict = "stop" if numbers[-2] > 0 else "step" if numbers.isfinite().all() else "skip"
    if verdict == "step":
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    clear_gradients(run)
    return verdict, numbers[:-2].view(seen.shape), numbers[-1].item()


def record_skip(run, step, examples, where, known=()):
    """Notes that a step was skipped. -> the log's entries about it.

    examples: the step's. where: their "file:line". known: indices of those that are known to be at fault.
    """
    names = [where[i] for i in (list(known) or find_nonfinite_examples(run, examples))[:5]]
    run.skips.append((step, names))
    return {"skipped": len(run.skips), "offending": names}


def find_nonfinite_examples(run, examples):
    """Indices of examples whose log-probability, or else its gradient, is not finite by itself."""
    logps = sequence_logps(run.model, examples, run.a.micro_tokens, run.rank, run.world)
    bad = [i for i, finite in enumerate(logps.isfinite().tolist()) if not finite]
    for i in range(len(examples)) if not bad else []:  # every rank all of them: a rare case, and so they agree
        example_logps(run.model, [examples[i]]).sum().backward()
        bad += [] if clip_gradients(run.model, 0).isfinite() else [i]
        clear_gradients(run)
    return bad
