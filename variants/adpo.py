"""ADPO, anchored direct preference optimisation (arXiv 2510.18913): DPO for groups of replies with rewards.

    python -m variants.adpo --ckpt sft.pt --data groups.jsonl        # -> sft-adpo.pt

Data: {"prompt", "completions", "rewards"} lines with two or more completions and as many rewards. {"prompt", "chosen",
"rejected"} lines and make_data.py's kto.jsonl work too, with rewards 1 and 0. Other flags are those of dpo. Versions
of the paper differ. Here the anchor is the fixed reference, log-probabilities are summed, and tau is constant.
"""

import argparse

import torch
from torch import Tensor

from core.devices import to_device
from core.distributed import run_distributed
from core.files import cli
from core.flags import Parser, number
from training.flags import add_training_flags
from training.preferences import preference_groups, train_on_groups


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


def parse_args() -> argparse.Namespace:
    p = Parser(description=__doc__)
    add_training_flags(p, "sft.pt", "data/kto.jsonl", None, epochs=1, batch_size=64, lr=1e-6, suffix="adpo")
    p.set_defaults(method="ADPO (arXiv 2510.18913)")
    p.add_argument("--ref", help="anchor checkpoint; without it, the model before training")
    cache = "file of the anchor's log-probabilities (default: ref-cache.safetensors beside OUT)"
    p.add_argument("--ref-cache", help=cache)
    p.add_argument("--tau", type=number(above=0), default=1.0, help="temperature of the log-ratios, in nats")
    p.add_argument("--reward-temperature", type=number(above=0), default=0.5, help="beta_r, temperature of the target")
    p.add_argument("--centre-only", action="store_true", help="do not divide the rewards by their standard deviation")
    return p.parse_args()


def main() -> None:
    args = parse_args()

    def loss(logps: Tensor, ref: Tensor, rewards: list[list[float]]) -> tuple[Tensor, Tensor]:
        targets = [adpo_target(torch.tensor(r), args.reward_temperature, not args.centre_only) for r in rewards]
        sizes, targets = [len(r) for r in rewards], [to_device(q, logps.device) for q in targets]
        groups = zip(logps.split(sizes), ref.split(sizes), targets)
        losses = torch.cat([logps[:0], *(adpo_loss(*group, args.tau)[None] for group in groups)])  # (n,), n may be 0
        return losses, (logps - ref) / args.tau

    train_on_groups(args, "adpo", preference_groups, loss)


if __name__ == "__main__":
    cli(run_distributed(main))
