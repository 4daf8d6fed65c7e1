"""OTR, one-token rollout (arXiv 2509.26313): REINFORCE on next tokens sampled at each supervised position.

    python -m variants.otr --beta -0.1 --ckpt base --data chats.jsonl --out otr

All flags of train_sft.py work. At --kappa 1 the expected gradient is (1 - beta) times DFT's, whatever beta is.
The authors' code was not found. Not known: their value of beta ("slightly negative"), so --beta has no default; and
whether the log in their loss is tempered. Ours is not. Takes (N, V) logits: keep --micro-tokens small.
"""

import random

import torch
from torch import Tensor

import train_sft
from core.distributed import run_distributed
from core.files import cli
from core.flags import at_least, number
from model import Qwen2
from training.logps import pack_to_device


def otr_loss(logits: Tensor, samples: Tensor, targets: Tensor, n_supervised: int, beta: float) -> Tensor:
    """OTR's loss of a micro-batch, a scalar; those of the micro-batches add up to the loss of the step.

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
    return torch.multinomial((logits.detach() / kappa).softmax(-1), k, replacement=True, generator=g)


def micro_loss(model: Qwen2, batch: train_sft.StepBatch, micro: list[int], args) -> Tensor:
    """The loss of a micro-batch. An example's samples follow from --seed, the step and the example alone."""
    examples = [batch.examples[i] for i in micro]
    ids, lengths, at, targets, owner = pack_to_device(examples or [([0, 0], [False, True])], model.device)
    logits = model(ids, lengths, at).float()  # (N, V)
    if not examples:  # a sharded rank without work
        return logits.sum() * 0
    if not args.samples:
        return expected_otr_loss(logits, targets, batch.n_supervised, args.beta, args.kappa)
    rows = logits.split(owner.bincount(minlength=len(micro)).tolist())
    seeds = [f"{args.seed} {batch.step} {batch.indices[i]}" for i in micro]
    samples = torch.cat([sample_tokens(row, args.samples, args.kappa, seed) for row, seed in zip(rows, seeds)])
    return otr_loss(logits, samples, targets, batch.n_supervised, args.beta)


def add_flags(parser) -> None:
    parser.description = __doc__.split("\n\n")[0]
    parser.set_defaults(out="otr.pt")
    parser.add_argument(
        "--beta", type=number(below=1), required=True, help="reward of a token that is not the gold one"
    )
    parser.add_argument("--kappa", type=number(above=0), default=1.3, help="temperature of the samples")
    parser.add_argument("--samples", type=at_least(0), default=256, help="K, per position; 0: the exact expectation")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags)
    train_sft.main(args, loss=lambda *step: micro_loss(*step, args))


if __name__ == "__main__":
    cli(run_distributed(main))
