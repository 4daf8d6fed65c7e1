"""Study 5, losses of related papers (variants/), with the data and steps of SFT and KTO.

    python -m experiments.related_losses --student smollm2-135m-instruct

DFT, ASFT, OTR and PoFT replace SFT, DPO replaces KTO after SFT, on KTO's pairs. Each runs at the learning rate of what it
replaces and at half of it, the first three also at twice that rate (arms named -half and -2x). The dev split decides
which of its rates is best.
"""

import argparse
import json
from pathlib import Path

from core.files import atomic_write, cli
from core.records import read_jsonl
from demo.split import paired_rows
from experiments import tables
from experiments.steps import choose_lr, command, evaluate, run_step, sft, study_flags, training_flags

RATES = {"half": 0.5, "2x": 2}  # in units of the learning rate of SFT or KTO
OTHER_RATES = [f"{loss}-{rate}" for loss, rate in tables.OTHER_RATES]
ARMS = [*tables.LOSS_NAMES, *OTHER_RATES]


def write_pairs(kto: str, path: str) -> None:
    """The pairs of kto.jsonl, as variants.dpo reads them."""
    with atomic_write(path) as f:
        for pair in paired_rows(row for _, row in read_jsonl(kto)):
            f.write(json.dumps(pair) + "\n")


def train_loss(args: argparse.Namespace, arm: str, suffix: str = "") -> None:
    """Trains an arm of ARMS. suffix: ends the names of the arm and of the arms that it builds on."""
    out, name = args.out, f"{arm}{suffix}"
    loss, _, rate = arm.rpartition("-") if arm in OTHER_RATES else (arm, "", "")
    lr = choose_lr(args, "kto" if loss == "sft-dpo" else "sft")
    lr = f"{RATES[rate] * float(lr):g}" if rate else lr
    if loss == "sft-dpo":
        pairs = f"{out}/data/pairs.jsonl"
        if not Path(pairs).exists():
            write_pairs(f"{out}/data/kto.jsonl", pairs)
        files = {"ckpt": f"{out}/sft{suffix}", "data": pairs, "out": f"{out}/{name}"}
        flags = training_flags(args, args.batch_size // 2)  # a pair has two replies
        run_step(out, name, command("variants.dpo", **files, lr=lr, beta=args.beta, **flags))
    else:
        more = {"poft": {"others": f"{out}/kto{suffix}"}, "otr": {"beta": "-0.1"}}.get(loss, {})
        sft(args, name, lr, "data/sft.jsonl", script=f"variants.{loss}", **more)


def main() -> None:
    p = study_flags(__doc__)
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="arms to run, in this order")
    args = p.parse_args()
    for arm in args.arms:
        train_loss(args, arm)
        evaluate(args, arm, "dev")
        evaluate(args, arm)
    print("next: python -m experiments.side_effects, with the same flags")


if __name__ == "__main__":
    cli(main)
