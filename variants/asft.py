"""ASFT, anchored SFT (arXiv 2509.23753): DFT and the full-vocabulary KL to the checkpoint before training.

    python -m variants.asft --ckpt base --data chats.jsonl --out asft

All flags of train_sft.py work. The reference is a second model in memory and a second forward in each step.
"""

import argparse

from torch import Tensor

import train_sft
from core.distributed import run_distributed
from core.files import cli
from core.flags import number
from model import Qwen2
from training.logps import supervised_logps_and_kl
from training.setup import load_frozen
from variants.dft import dft_loss


def asft_loss(logits: Tensor, ref_logits: Tensor, targets: Tensor, n_supervised: int, lam: float) -> Tensor:
    """ASFT's loss of a micro-batch, a scalar in nats; the micro-batches' losses add up to the step's.

        L = (1/n) sum_t [ -sg(p_t) log p_t + lam KL_t ]
        KL_t = sum_v ref(v | s_t) (log ref(v | s_t) - log pi(v | s_t))        forward KL: the reference comes first

    logits, ref_logits: (N, V) of the supervised positions. targets: (N,) tokens x_t, p_t = pi(x_t | s_t).
    n_supervised: n, supervised tokens of the step. Only logits get a gradient.
    """
    log_pi, log_ref = logits.log_softmax(-1), ref_logits.detach().log_softmax(-1)
    kl = (log_ref.exp() * (log_ref - log_pi)).sum(-1)  # (N,)
    return asft_from_kl(log_pi.gather(1, targets[:, None])[:, 0], kl, n_supervised, lam)


def asft_from_kl(logps: Tensor, kl: Tensor, n_supervised: int, lam: float) -> Tensor:
    """asft_loss from log p_t and KL_t, (N,) each."""
    return dft_loss(logps, n_supervised) + lam * kl.sum() / n_supervised


def micro_loss(model: Qwen2, batch: train_sft.StepBatch, micro: list[int], ref: Qwen2, lam: float) -> Tensor:
    """asft_loss of a micro-batch, without (N, V) logits in memory."""
    examples = [batch.examples[i] for i in micro]
    logps, kl, _ = supervised_logps_and_kl(model, ref, examples, forward_kl=True)  # (N,) each
    return asft_from_kl(logps, kl, batch.n_supervised, lam)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="asft.pt", method="ASFT (arXiv 2509.23753)")
    parser.add_argument("--kl-weight", type=number(0), default=0.05, help="lambda of the KL; the authors' code has 0.1")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags)
    load_reference = lambda setup: load_frozen(setup.ckpt, args, setup.ranks)
    loss = lambda model, batch, micro: micro_loss(model, batch, micro, batch.prepared, args.kl_weight)
    train_sft.main(args, prepare=load_reference, loss=loss)


if __name__ == "__main__":
    cli(run_distributed(main))
