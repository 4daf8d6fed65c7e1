"""OTR, one-token rollout (arXiv 2509.26313): REINFORCE on next tokens sampled at each supervised position.

    python -m variants.otr --beta -0.1 --ckpt base --data chats.jsonl --out otr

All flags of train_sft.py work except --shard. At --kappa 1 the expected gradient is (1 - beta) times DFT's.
The authors' code was not found. Their beta is "slightly negative", so --beta has no default. It is not known whether
the temperature also applies to the log in the loss. Here it does not.
"""

import argparse
import random

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import train_sft
from core.distributed import run_distributed
from core.files import cli
from core.flags import at_least, number
from core.layers import project
from model import Qwen2
from training.logps import pack_to_device


def otr_loss(logits: Tensor, samples: Tensor, targets: Tensor, n_supervised: int, beta: float) -> Tensor:
    """OTR's loss of a micro-batch, a scalar; the micro-batches' losses add up to the step's.

        L = -(1/n) sum_t (1/K) sum_j R_j log pi(a_j | s_t)        R_j = 1 if a_j = x_t, else beta

    logits: (N, V). samples: (N, K) tokens a_j ~ softmax(logits / kappa). targets: (N,) tokens x_t.
    """
    reward = torch.where(samples == targets[:, None], 1.0, beta)  # (N, K)
    return -(reward * logits.log_softmax(-1).gather(1, samples)).mean(1).sum() / n_supervised


def expected_otr_loss(logits: Tensor, targets: Tensor, n_supervised: int, beta: float, kappa: float) -> Tensor:
    """The expectation of otr_loss over the samples: K sampled tokens become sg(softmax(logits / kappa)) over all V."""
    log_pi, gold = logits.log_softmax(-1), targets[:, None]
    proposal = (logits.detach() / kappa).softmax(-1)  # (N, V)
    reward = torch.full_like(proposal, beta).scatter(1, gold, 1.0)
    return -(proposal * reward * log_pi).sum() / n_supervised


def sample_tokens(logits: Tensor, k: int, kappa: float, seed: str) -> Tensor:
    """k tokens for each row of logits (N, V), drawn with replacement from softmax(logits / kappa) -> (N, k)."""
    g = torch.Generator(logits.device).manual_seed(random.Random(seed).getrandbits(63))
    p = (logits.detach() / kappa).softmax(-1).nan_to_num(1.0)  # NaN: any tokens, as the loss is NaN and skips the step
    return torch.multinomial(p, k, replacement=True, generator=g)


TILE = 2**25  # logits in memory at once: 128 MiB in fp32


def tile_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, n_supervised: int, args: argparse.Namespace, seed: str
) -> Tensor:
    """The loss of some positions of one example. hidden: (n, C), head: (V, C), targets: (n,)."""
    logits = project(hidden, head).float()  # (n, V)
    if not args.samples:
        return expected_otr_loss(logits, targets, n_supervised, args.beta, args.kappa)
    samples = sample_tokens(logits, args.samples, args.kappa, seed)
    return otr_loss(logits, samples, targets, n_supervised, args.beta)


def micro_loss(model: Qwen2, batch: train_sft.StepBatch, micro: list[int], args: argparse.Namespace) -> Tensor:
    """The loss of a micro-batch. An example's samples depend only on --seed, the step and the example.

    Only the logits of one tile of positions are in memory: the backward recomputes them, with the same samples.
    """
    ids, lengths, at, targets, owner = pack_to_device([batch.examples[i] for i in micro], model.device)
    hidden, head, loss = model.hidden(ids, lengths, at=at)[0], model.head_weight, 0  # (N, C), (V, C)
    sizes, rows = owner.bincount(minlength=len(micro)).tolist(), max(1, TILE // len(head))
    for i, h, x in zip(micro, hidden.split(sizes), targets.split(sizes)):  # the positions of one example
        for k, tile in enumerate(zip(h.split(rows), x.split(rows))):
            seed = f"{args.seed} {batch.step} {batch.indices[i]} {k}"
            loss += checkpoint(tile_loss, tile[0], head, tile[1], batch.n_supervised, args, seed, use_reentrant=False)
    return loss


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="otr.pt", method="OTR (arXiv 2509.26313)")
    other = "reward of a sampled token that is not the target"
    parser.add_argument("--beta", type=number(below=1), required=True, help=other)
    parser.add_argument("--kappa", type=number(above=0), default=1.3, help="temperature of the samples")
    parser.add_argument(
        "--samples", type=at_least(0), default=256, help="K, samples per position; 0: the exact expectation"
    )


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags, no_shard="a sharded model has its head only inside forward")
    train_sft.main(args, loss=lambda *step: micro_loss(*step, args))


if __name__ == "__main__":
    cli(run_distributed(main))
