"""DFT, dynamic fine-tuning (arXiv 2508.05629): the cross-entropy of each token, weighted by its own probability.

    python -m variants.dft --ckpt base --data chats.jsonl --out dft

All flags of train_sft.py work. The gradient of a token shrinks with its probability, so tune the learning
rate separately before comparing with SFT. The authors use 5e-5 with batches of 256.
"""

import argparse

from torch import Tensor

import train_sft
from core.distributed import run_distributed
from core.files import cli
from model import Qwen2
from training.logps import supervised_logps


def dft_loss(logps: Tensor, n_supervised: int) -> Tensor:
    """DFT's loss of a micro-batch, a scalar in nats; the micro-batches' losses add up to the step's.

        L = (1/n) sum_t -sg(p_t) log p_t        p_t = pi(x_t | s_t), sg(.) without gradient

    logps: (N,) log p_t of the supervised tokens of the micro-batch. n_supervised: n, supervised tokens of the step.
    """
    return -(logps.detach().exp() * logps).sum() / n_supervised


def micro_loss(model: Qwen2, batch: train_sft.StepBatch, micro: list[int]) -> Tensor:
    logps, _ = supervised_logps(model, [batch.examples[i] for i in micro])  # (N,)
    return dft_loss(logps, batch.n_supervised)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="dft.pt", method="DFT (arXiv 2508.05629)")


def main() -> None:
    train_sft.main(train_sft.parse_args(add_flags=add_flags), loss=micro_loss)


if __name__ == "__main__":
    cli(run_distributed(main))
