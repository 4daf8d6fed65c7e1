"""Study 5, losses of related papers (variants/), with the data and steps of SFT and KTO.

    python -m experiments.related_losses --student smollm2-135m-instruct

DFT, ASFT, OTR and PoFT replace SFT, each at SFT's learning rate; the first three also at half and at twice that rate
(arms named -half and -2x). DPO replaces KTO after SFT, on KTO's pairs and at KTO's rate.
"""

import argparse
import json
from pathlib import Path

from core.files import atomic_write, cli
from core.records import read_jsonl
from demo.split import paired_rows
from experiments.steps import choose_lr, command, evaluate, run_step, sft, study_flags, training_flags

RATES = {"half": 0.5, "2x": 2}  # in units of SFT's learning rate
ARMS = [
    "dft",
    "asft",
    "sft-dpo",
    "poft",
    "otr",
    *(f"{loss}-{rate}" for loss in ("dft", "asft", "otr") for rate in RATES),
]


def write_pairs(kto: str, path: str) -> None:
    """The pairs of kto.jsonl, as variants.dpo reads them."""
    with atomic_write(path) as f:
        for pair in paired_rows(row for _, row in read_jsonl(kto)):
            f.write(json.dumps(pair) + "\n")


def train_loss(args: argparse.Namespace, arm: str, suffix: str = "") -> None:
    """Trains and evaluates an arm. suffix: ends the names of the arm and of the arms that it builds on."""
    out = args.out
    if arm == "sft-dpo":
        pairs = f"{out}/data/pairs.jsonl"
        if not Path(pairs).exists():
            write_pairs(f"{out}/data/kto.jsonl", pairs)
        files = {"ckpt": f"{out}/sft{suffix}", "data": pairs, "out": f"{out}/{arm}{suffix}"}
        flags = training_flags(args, args.batch_size // 2)  # a pair has two replies
        lr = choose_lr(args, "kto")
        run_step(out, f"{arm}{suffix}", command("variants.dpo", **files, lr=lr, beta=args.beta, **flags))
    else:
        loss, _, rate = arm.partition("-")
        lr = choose_lr(args, "sft")
        lr = f"{RATES[rate] * float(lr):g}" if rate else lr
        more = {"poft": {"others": f"{out}/kto{suffix}"}, "otr": {"beta": "-0.1"}}.get(loss, {})
        sft(args, f"{arm}{suffix}", lr, "data/sft.jsonl", script=f"variants.{loss}", **more)
    evaluate(args, f"{arm}{suffix}")


def main() -> None:
    p = study_flags(__doc__)
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="arms to run, in this order")
    args = p.parse_args()
    for arm in args.arms:
        train_loss(args, arm)
    print("next: python -m experiments.side_effects, with the same flags")


if __name__ == "__main__":
    cli(main)
