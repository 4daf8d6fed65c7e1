"""Study 1, the paper's table: the student before training, SFT, KTO, SFT then KTO, and their fusions.

    python -m experiments.paper_table --student smollm2-135m-instruct

The learning rates are chosen on the dev split. The paper's own rates (1e-6 and 5e-8, for a 0.5B model) are run too.
"""

import argparse
import json
from pathlib import Path

from core.files import cli
from experiments.steps import choose_lr, command, evaluate, kto, run_step, sft, study_flags, train_chosen

FUSIONS = {"mean": (0.5, 0.5), "mean-05-95": (0.05, 0.95)}  # weights of SFT and SFT-KTO


def merge(args: argparse.Namespace, name: str, models: list[str], method: str = "linear", **flags: object) -> None:
    """The arm `name`. models: arms of OUT, as ARM or ARM:WEIGHT."""
    models = [f"{args.out}/{model}" for model in models]
    run_step(args.out, name, command("merge.py", method=method, models=models, **flags, out=f"{args.out}/{name}"))
    evaluate(args, name)


def fuse(args: argparse.Namespace, arm: str, suffix: str = "") -> None:
    """An arm of FUSIONS, or ties. suffix: ends the names of the arm and of the arms that it combines."""
    if arm == "ties":
        models = [f"sft{suffix}", f"kto{suffix}"]
        return merge(args, f"ties{suffix}", models, "ties", base=args.student, density=0.5)
    first, second = FUSIONS[arm]
    merge(args, f"{arm}{suffix}", [f"sft{suffix}:{first}", f"sft-kto{suffix}:{second}"])


def search_weights(args: argparse.Namespace) -> list[float]:
    """The weights of SFT and SFT-KTO in the best of eight linear fusions, by instructions followed on the dev split."""
    found = f"{args.out}/search.json"
    words = command(
        "merge.py search",
        method="linear",
        models=[f"{args.out}/sft", f"{args.out}/sft-kto"],
        tasks="ifeval",
        data_dir=f"{args.out}/instructions/dev",
        aside=0.1,
        evaluations=8,
        max_new_tokens=args.max_new_tokens,
        batch_size=64,
        dtype=args.dtype,
        out=found,
    )
    run_step(args.out, "search", words)
    return json.loads(Path(found).read_text())["best"]["weights"]


def main() -> None:
    p = study_flags(__doc__)
    arms = ["base", "sft", "kto", "sft-kto", "fusions", "ties", "searched", "paper-lr"]
    p.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms to run, in this order")
    args = p.parse_args()
    for arm in args.arms:
        if arm == "base":
            evaluate(args, "base", ckpt=args.student)
        elif arm in ("sft", "kto"):
            train_chosen(args, arm)
            evaluate(args, arm)
        elif arm == "sft-kto":
            kto(args, "sft-kto", f"{args.out}/sft", choose_lr(args, "kto"), "data/kto.jsonl")
            evaluate(args, "sft-kto")
        elif arm == "fusions":
            fuse(args, "mean")
            fuse(args, "mean-05-95")
        elif arm == "ties":
            fuse(args, "ties")
        elif arm == "searched":
            first, second = search_weights(args)
            merge(args, "searched", [f"sft:{first:.4g}", f"sft-kto:{second:.4g}"])
        else:
            sft(args, "sft-paper-lr", "1e-6", "data/sft.jsonl")
            evaluate(args, "sft-paper-lr")
            kto(args, "sft-kto-paper-lr", f"{args.out}/sft-paper-lr", "5e-8", "data/kto.jsonl")
            evaluate(args, "sft-kto-paper-lr")
    print("next: python -m experiments.own_responses, with the same flags")


if __name__ == "__main__":
    cli(main)
