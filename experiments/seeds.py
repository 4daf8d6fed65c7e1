"""Other seeds: the main arms again, on the same data. The seed decides the order of the examples and OTR's samples.

    python -m experiments.seeds --student smollm2-135m-instruct --seeds 1 2

The arms are named ARM-seed-N. Learning rates are those chosen with seed 0.
"""

import argparse

from core.files import cli
from core.flags import at_least
from experiments import related_losses
from experiments.paper_table import FUSIONS, fuse
from experiments.steps import choose_lr, evaluate, kto, sft, study_flags

FUSED = [*FUSIONS, "ties"]
MAIN = ["sft", "kto", "sft-kto", *FUSED]
ARMS = [*MAIN, *related_losses.ARMS]


def train_with_seed(args: argparse.Namespace, arm: str, seed: int, rates: dict[str, str]) -> None:
    """Trains and evaluates the arm ARM-seed-N. rates: the learning rates of SFT and KTO."""
    suffix = f"-seed-{seed}"
    if arm in FUSED:
        return fuse(args, arm, suffix)
    args = argparse.Namespace(**{**vars(args), "seed": seed, "sft_lrs": [rates["sft"]], "kto_lrs": [rates["kto"]]})
    if arm == "sft":
        sft(args, f"sft{suffix}", rates["sft"], "data/sft.jsonl")
    elif arm in ("kto", "sft-kto"):
        ckpt = args.student if arm == "kto" else f"{args.out}/sft{suffix}"
        kto(args, f"{arm}{suffix}", ckpt, rates["kto"], "data/kto.jsonl")
    else:
        related_losses.train_loss(args, arm, suffix)
    evaluate(args, f"{arm}{suffix}")


def main() -> None:
    p = study_flags(__doc__)
    p.add_argument("--seeds", nargs="+", type=at_least(1), default=[1, 2], help="seeds to run")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=MAIN, help="arms to run, in this order")
    args = p.parse_args()
    rates = {kind: choose_lr(args, kind) for kind in ("sft", "kto")}
    for arm in args.arms:
        for seed in args.seeds:
            train_with_seed(args, arm, seed, rates)
    print("next: python -m experiments.collect --help")


if __name__ == "__main__":
    cli(main)
