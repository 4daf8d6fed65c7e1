"""DPO, direct preference optimisation (arXiv 2305.18290): the loss of preference pairs.

    python -m variants.dpo --ckpt sft.pt --data pairs.jsonl                # -> sft-dpo.pt

Data: {"prompt", "chosen", "rejected"} lines. The flags are those of train_kto.py without its label weights.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.devices import to_device
from core.distributed import run_distributed
from core.files import cli
from core.flags import Parser, checkpoint_out, number
from training.flags import add_reference_flags, add_training_flags, check_cache_path, check_default_inputs, kto_out
from training.logps import example_logps
from training.preferences import Groups, best_and_worst, preference_metrics, preference_pairs, start_preference_run
from training.run import Run, end_step, eval_due, eval_logps, finish_run, progress, stop_run
from training.step import lr_at, micro_batches, optimizer_step, record_skip, seed_step


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """DPO's loss of each pair and the implicit rewards of both replies. -> (losses (n,), rewards (n, 2)).

        r = beta (log pi(y | x) - log ref(y | x))        d = r_chosen - r_rejected
        loss = -(1 - eps) log sigmoid(d) - eps log sigmoid(-d)        eps = label_smoothing

    All inputs: (n,) log-probabilities of the replies, summed over their tokens, in nats. beta: per nat.
    eps is the probability that a pair has the wrong order; 0 is DPO (Eq. 7).
    """
    rewards = beta * torch.stack((policy_chosen - ref_chosen, policy_rejected - ref_rejected), dim=1)  # (n, 2)
    d = rewards[:, 0] - rewards[:, 1]
    return -(1 - label_smoothing) * F.logsigmoid(d) - label_smoothing * F.logsigmoid(-d), rewards.detach()


def group_losses(loss: Callable, logps: Tensor, data: Groups, indices: list[int]) -> tuple[Tensor, Tensor]:
    """-> the losses (n,) of these groups of replies, and the (5, n) numbers of preference_metrics.

    logps: (m,) of all their replies in order. loss(logps, ref_logps, rewards) -> (losses (n,), implicit rewards (m,)).
    Its rewards are those of the data, one list for each group.
    """
    ref = to_device(torch.tensor([data.ref[key] for key in data.keys(indices)]), logps.device)
    rewards = [data.rows[i][2] for i in indices]
    losses, implicit = loss(logps, ref, rewards)  # (n,), (m,)
    best, worst = (to_device(places, logps.device) for places in best_and_worst(rewards))
    return losses, torch.stack((losses, implicit[best], implicit[worst], logps[best], logps[worst])).detach()


def train(run: Run, data: Groups, held_out: Groups | None, loss: Callable) -> bool:
    """Runs all remaining steps. -> True, or False if SIGTERM or Ctrl-C stopped the run (it is then already saved).

    A group is never divided between micro-batches.
    """
    model, args, device = run.model, run.args, run.ranks.device
    if run.pending and not end_step(run, with_eval(run, run.pending, held_out, loss)):
        return False
    for step in (bar := progress(run, "dpo")):
        start = time.time()
        seed_step(run, step)
        indices = data.steps[step]
        lengths = [data.length(i) for i in indices]
        step_stats = torch.zeros(5, len(indices), device=device)
        for micro in micro_batches(run, lengths):
            some = [indices[k] for k in micro]
            losses, stats = group_losses(loss, example_logps(model, data.sequences(some)), data, some)
            (losses.sum() / len(indices)).backward()
            step_stats[:, to_device(torch.tensor(micro, dtype=torch.long), device)] = stats
        lr = lr_at(step, run.total, args.lr, args.warmup, args.schedule)
        result = optimizer_step(run, lr, step_stats)
        if result.status == "stop":
            stop_run(run, step)
            return False

        record = {"step": step + 1, "lr": lr, "grad_norm": result.grad_norm} | preference_metrics(result.stats)
        record |= {"tokens": sum(lengths), "tokens_per_second": sum(lengths) / (time.time() - start)}
        if result.status == "skip":
            places = [data.places[i] for i, _ in data.keys(indices)]
            record |= record_skip(run, step + 1, data.sequences(indices), places)
        if not end_step(run, with_eval(run, record, held_out, loss)):
            return False
        bar.set_postfix(loss=f"{record['loss']:.4f}")
    return True


def with_eval(run: Run, record: dict, held_out: Groups | None, loss: Callable) -> dict | None:
    """Adds the held-out metrics to the step's log record if an evaluation is due. None if the run was stopped in it."""
    if not held_out or not eval_due(run, record):
        return record
    every = list(range(len(held_out.rows)))
    logps = eval_logps(run, record, held_out.sequences(every))
    if logps is None:
        return None
    _, stats = group_losses(loss, logps.cpu(), held_out, every)
    return record | {f"eval_{name}": value for name, value in preference_metrics(stats).items()}


def parse_args() -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n\n")[0])
    add_training_flags(p, "sft.pt", "data/pairs.jsonl", None, epochs=1, batch_size=64, lr=1e-6, method="dpo")
    p.set_defaults(method="DPO (arXiv 2305.18290)")
    add_reference_flags(p)
    smoothing = "probability that a pair is in the wrong order"
    p.add_argument("--label-smoothing", type=number(0, below=0.5), default=0.0, help=smoothing)
    return p.parse_args()


def train_on_groups(args: argparse.Namespace, name: str, parse: Callable, loss: Callable) -> None:
    """A whole run. name: for the default --out. parse: preference_pairs or preference_groups. loss: see group_losses."""
    args.out = args.out or checkpoint_out(kto_out(args.ckpt, name))
    check_default_inputs(args)
    check_cache_path(args)
    run, data, held_out = start_preference_run(args, parse)
    if run and train(run, data, held_out, loss):
        follow = ["python", "eval.py", "--ckpt", args.ckpt, args.out, "--tasks", "gsm8k"]
        finish_run(run, [f"{len(data.rows)} prompts with their replies"], [follow])


def main() -> None:
    args = parse_args()

    def loss(logps: Tensor, ref: Tensor, rewards: list[list[float]]) -> tuple[Tensor, Tensor]:
        policy_pairs, ref_pairs = logps.view(-1, 2), ref.view(-1, 2)  # (n, 2), the chosen reply first
        losses, implicit = dpo_loss(*policy_pairs.T, *ref_pairs.T, args.beta, args.label_smoothing)
        return losses, implicit.flatten()

    train_on_groups(args, "dpo", preference_pairs, loss)


if __name__ == "__main__":
    cli(run_distributed(main))
