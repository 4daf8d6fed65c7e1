"""DPO, direct preference optimisation (arXiv 2305.18290): the loss of preference pairs.

    python -m variants.dpo --ckpt sft.pt                                  # data/kto.jsonl -> sft-dpo.pt

Data: {"prompt", "chosen", "rejected"} lines, or make_data.py's kto.jsonl: a desirable and an undesirable completion of
one prompt are a pair. All flags of train_kto.py work except its label weights.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from core.distributed import run_distributed
from core.files import cli
from core.flags import Parser, number
from training.flags import add_reference_flags, add_training_flags
from training.preferences import preference_pairs, train_on_groups


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
    eps is the probability that a pair is in the wrong order. eps = 0 is DPO (Eq. 7).
    """
    rewards = beta * torch.stack((policy_chosen - ref_chosen, policy_rejected - ref_rejected), dim=1)  # (n, 2)
    d = rewards[:, 0] - rewards[:, 1]
    return -(1 - label_smoothing) * F.logsigmoid(d) - label_smoothing * F.logsigmoid(-d), rewards.detach()


def parse_args() -> argparse.Namespace:
    p = Parser(description=__doc__)
    add_training_flags(p, "sft.pt", "data/kto.jsonl", None, epochs=1, batch_size=64, lr=1e-6, suffix="dpo")
    p.set_defaults(method="DPO (arXiv 2305.18290)")
    add_reference_flags(p)
    smoothing = "probability that a pair is in the wrong order"
    p.add_argument("--label-smoothing", type=number(0, below=0.5), default=0.0, help=smoothing)
    return p.parse_args()


def main() -> None:
    args = parse_args()

    def loss(logps: Tensor, ref: Tensor, rewards: list[list[float]]) -> tuple[Tensor, Tensor]:
        policy_pairs, ref_pairs = logps.view(-1, 2), ref.view(-1, 2)  # (n, 2), the chosen reply first
        losses, implicit = dpo_loss(*policy_pairs.T, *ref_pairs.T, args.beta, args.label_smoothing)
        return losses, implicit.flatten()

    train_on_groups(args, "dpo", preference_pairs, loss)


if __name__ == "__main__":
    cli(run_distributed(main))
