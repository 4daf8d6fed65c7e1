"""DPO, direct preference optimisation (arXiv 2305.18290), and ADPO, the same for groups with rewards (arXiv 2510.18913).

    python -m variants.dpo --ckpt sft.pt --data pairs.jsonl                # -> sft-dpo.pt
    python -m variants.dpo --adpo --ckpt sft.pt --data groups.jsonl        # -> sft-adpo.pt

Data: {"prompt", "chosen", "rejected"} lines; with --adpo also {"prompt", "completions", "rewards"}, lists of two or
more. chosen and rejected then have the rewards 1 and 0. The flags are those of train_kto.py without its label weights.
Versions of the ADPO paper disagree. Here the anchor is the fixed reference, log-probabilities are summed, tau is constant.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention import to_device
from core.distributed import run_distributed
from core.files import InputError, cli
from core.flags import Parser, checkpoint_out, number
from training.flags import add_reference_flags, add_training_flags, check_cache_path, check_default_inputs, kto_out
from training.logps import example_logps
from training.preferences import (
    Groups,
    best_and_worst,
    preference_groups,
    preference_metrics,
    preference_pairs,
    start_preference_run,
)
from training.run import end_step, eval_due, eval_logps, finish_run, progress, stop_run
from training.saves import Run
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


def adpo_loss(logps: Tensor, anchors: Tensor, target: Tensor, tau: float) -> Tensor:
    """ADPO's loss of one group of K replies, a scalar.

        loss = -sum_i q_i log p_i        p = softmax((log pi(y_i | x) - log anchor(y_i | x)) / tau)

    logps, anchors: (K,) summed over the tokens, in nats. target: (K,) q. tau: in nats.
    K = 2, tau = 1 / beta and q = (1 - eps, eps) is DPO with label smoothing eps.
    """
    return -(target * ((logps - anchors) / tau).log_softmax(0)).sum()


def adpo_target(rewards: Tensor, temperature: float, standardise: bool = True) -> Tensor:
    """q = softmax(A / beta_r) of a group, (K,) -> (K,). A = (R - mean) / (std + 1e-8), std with K - 1; or R - mean."""
    centred = rewards - rewards.mean()
    return ((centred / (rewards.std() + 1e-8) if standardise else centred) / temperature).softmax(0)


# ---------------------------------------------------------------------------------------------------------------------


def group_losses(args: argparse.Namespace, logps: Tensor, data: Groups, indices: list[int]) -> tuple[Tensor, Tensor]:
    """The loss of each of these n groups and the (5, n) numbers of preference_metrics. logps: of all replies in order."""
    ref = to_device(torch.tensor([data.ref[key] for key in data.keys(indices)]), logps.device)
    scores, n = [data.rows[i][2] for i in indices], len(indices)
    if args.adpo:
        sizes, targets = list(map(len, scores)), [torch.tensor(s) for s in scores]
        targets = [
            to_device(adpo_target(q, args.reward_temperature, not args.centre_only), ref.device) for q in targets
        ]
        groups = zip(logps.split(sizes), ref.split(sizes), targets)
        losses = torch.cat([logps[:0], *(adpo_loss(*group, args.tau)[None] for group in groups)])  # (n,)
    else:
        losses, _ = dpo_loss(*logps.view(n, 2).T, *ref.view(n, 2).T, args.beta, args.label_smoothing)
    best, worst = (to_device(places, logps.device) for places in best_and_worst(scores))
    rewards = (logps - ref) * (1 / args.tau if args.adpo else args.beta)
    return losses, torch.stack((losses, rewards[best], rewards[worst], logps[best], logps[worst])).detach()


def train(run: Run, data: Groups, held_out: Groups | None) -> bool:
    """Runs all remaining steps. -> True, or False if SIGTERM or Ctrl-C stopped the run (it is then already saved).

    A group is never divided between micro-batches.
    """
    model, args, device = run.model, run.args, run.ranks.device
    if run.pending and not end_step(run, with_eval(run, run.pending, held_out)):
        return False
    for step in (bar := progress(run, "dpo")):
        start = time.time()
        seed_step(run, step)
        indices = data.steps[step]
        lengths = [data.length(i) for i in indices]
        step_stats = torch.zeros(5, len(indices), device=device)
        for micro in micro_batches(run, lengths):
            some = [indices[k] for k in micro]
            losses, stats = group_losses(args, example_logps(model, data.sequences(some)), data, some)
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
        if not end_step(run, with_eval(run, record, held_out)):
            return False
        bar.set_postfix(loss=f"{record['loss']:.4f}")
    return True


def with_eval(run: Run, record: dict, held_out: Groups | None) -> dict | None:
    """Adds the held-out metrics to the step's log record if an evaluation is due. None if the run was stopped in it."""
    if not held_out or not eval_due(run, record):
        return record
    every = list(range(len(held_out.rows)))
    logps = eval_logps(run, record, held_out.sequences(every))
    if logps is None:
        return None
    _, stats = group_losses(run.args, logps.cpu(), held_out, every)
    return record | {f"eval_{name}": value for name, value in preference_metrics(stats).items()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n\n")[0])
    add_training_flags(p, "sft.pt", "data/pairs.jsonl", None, epochs=1, batch_size=64, lr=1e-6)  # TRL's learning rate
    # DPO
    add_reference_flags(p)
    smoothing = "probability that a pair is in the wrong order"
    p.add_argument("--label-smoothing", type=number(0, below=0.5), default=0.0, help=smoothing)
    # ADPO
    p.add_argument("--adpo", action="store_true", help="learn from groups with rewards; --beta has no effect")
    p.add_argument("--tau", type=number(above=0), default=1.0, help="temperature of the log-ratios, in nats")
    p.add_argument("--reward-temperature", type=number(above=0), default=0.5, help="beta_r, temperature of the target")
    p.add_argument("--centre-only", action="store_true", help="do not divide the rewards by their standard deviation")
    args = p.parse_args(argv)
    args.method = "ADPO (arXiv 2510.18913)" if args.adpo else "DPO (arXiv 2305.18290)"
    args.out = args.out or checkpoint_out(kto_out(args.ckpt, "adpo" if args.adpo else "dpo"))
    if args.adpo and args.label_smoothing:
        raise InputError("--label-smoothing: has no effect with --adpo, whose rewards give the target; leave it out")
    check_default_inputs(args)
    check_cache_path(args)
    return args


def main() -> None:
    args = parse_args()
    run, data, held_out = start_preference_run(args, preference_groups if args.adpo else preference_pairs)
    if run and train(run, data, held_out):
        follow = ["python", "eval.py", "--ckpt", args.ckpt, args.out, "--tasks", "gsm8k"]
        finish_run(run, [f"{len(data.rows)} {'groups' if args.adpo else 'pairs'}"], [follow])


if __name__ == "__main__":
    cli(run_distributed(main))
