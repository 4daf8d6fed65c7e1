"""LT-SFT, composable sparse fine-tuning (arXiv 2110.07560): retrains only the weights that moved most in a first run.

    python train_sft.py --ckpt base --data a.jsonl --out moved-a                                  # phase 1
    python -m variants.lt_sft --moved moved-a --density 0.01 --ckpt base --data a.jsonl --out a   # phase 2
    python merge.py --method task_arithmetic --base base --models a:1 b:1 --out both              # skills add up

All flags of train_sft.py work except --shard and --weight-decay. Norms stay frozen, as in the authors' scripts.
"""

import argparse
from collections.abc import Callable, Iterator

from torch import Tensor

import train_sft
from core.checkpoint import Checkpoint
from core.distributed import run_distributed
from core.files import InputError, cli
from core.flags import number
from core.tokenizer import check_vocabulary
from merging.methods import kth_largest
from model import check_finite, check_tensors
from training.setup import Setup

CHUNK = 2**22  # weights whose distances are in memory at once


def lottery_masks(start: dict[str, Tensor], moved: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k weights that moved most, over all tensors together -> {name: bool mask}. Ties at the threshold are kept.

    mask = |theta_1 - theta_0| >= the k-th largest of all |theta_1 - theta_0|
    """

    def scan(f: Callable, stride: int) -> Iterator:  # as kth_largest wants it, for one model
        for name, before in start.items():
            for b, a in zip(before.flatten().split(CHUNK), moved[name].flatten().split(CHUNK)):  # views, not copies
                yield f(distance(b[::stride], a[::stride])[None].cpu())  # of (1, c)

    (threshold,) = kth_largest(scan, [k], sum(t.numel() for t in start.values()))
    if not threshold:  # all weights tie
        raise InputError(f"--moved: fewer than {k:,} weights differ from --ckpt; give phase 1's, or lower --density")
    return {name: distance(t, moved[name]) >= threshold for name, t in start.items()}


def distance(before: Tensor, after: Tensor) -> Tensor:
    return (after.to(before) - before).abs_()


def freeze_the_rest(setup: Setup) -> None:
    """Zeroes the gradients outside the masks, before they are clipped."""
    args, names = setup.args, dict(setup.model.named_parameters())
    moved = Checkpoint(args.moved)
    check_vocabulary(moved, setup.ckpt)
    args.moved_fingerprint = moved.fingerprint()  # for --resume
    check_tensors(moved, {name: tuple(p.shape) for name, p in names.items()})
    for name in [name for name in names if "norm" in name]:
        names.pop(name).requires_grad_(False)
    start = {name: p.detach() for name, p in names.items()}
    after = {name: check_finite(moved, name, moved.tensor(name)) for name in names}
    k = max(1, int(args.density * sum(p.numel() for p in names.values())))
    for name, mask in lottery_masks(start, after, k).items():
        if mask.any():
            names[name].register_hook(lambda grad, mask=mask: grad * mask)
        else:
            names[name].requires_grad_(False)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="sparse.pt", method="LT-SFT (arXiv 2110.07560)")
    parser.add_argument("--moved", required=True, help="checkpoint of phase 1, fine-tuned in full from --ckpt")
    share = "share of the weights to train; 0.01 is the authors' default"
    parser.add_argument("--density", type=number(above=0, below=1), default=0.01, help=share)


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags, no_shard="masks need whole matrices, but a rank holds parts")
    if args.weight_decay:
        raise InputError(f"--weight-decay {args.weight_decay:g}: would change the frozen weights too; leave it out")
    train_sft.main(args, prepare=freeze_the_rest)


if __name__ == "__main__":
    cli(run_distributed(main))
