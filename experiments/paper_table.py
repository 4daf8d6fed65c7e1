"""Study 1, the paper's table: SFT, KTO, SFT then KTO, and fusions of them, beside the student as it was.

    python -m experiments.paper_table --student smollm2-135m-instruct

The learning rates are chosen on the dev split. The paper's own (1e-6 and 5e-8, for a 0.5B model) are run beside them.
"""

import argparse
import json
from pathlib import Path

from core.files import cli
from experiments.steps import choose_lr, evaluate, kto, run_step, sft, study_flags, train_chosen


def fuse(args: argparse.Namespace) -> None:
    """The paper's fusions: A (SFT) with B (SFT then KTO)."""
    for name, weights in (("mean", (0.5, 0.5)), ("mean-05-95", (0.05, 0.95))):
        models = [f"{args.out}/{arm}:{weight}" for arm, weight in zip(("sft", "sft-kto"), weights)]
        run_step(args.out, name, ["merge.py", "--method", "linear", "--models", *models, "--out", f"{args.out}/{name}"])
        evaluate(args, name)


def fuse_at_searched_weight(args: argparse.Namespace) -> None:
    """The linear fusion of A and B that follows most instructions of the dev split, of eight."""
    models, found = [f"{args.out}/{arm}" for arm in ("sft", "sft-kto")], f"{args.out}/search.json"
    generation = ["--max-new-tokens", str(args.max_new_tokens), "--batch-size", "64", "--dtype", args.dtype]
    command = ["merge.py", "search", "--method", "linear", "--models", *models, "--tasks", "ifeval"]
    command += ["--data-dir", f"{args.out}/instructions/dev", "--aside", "0.1", "--evaluations", "8"]
    run_step(args.out, "search", [*command, *generation, "--out", found])
    weights = json.loads(Path(found).read_text())["best"]["weights"]
    weighted = [f"{model}:{weight:.4g}" for model, weight in zip(models, weights)]
    out = f"{args.out}/searched"
    run_step(args.out, "searched", ["merge.py", "--method", "linear", "--models", *weighted, "--out", out])
    evaluate(args, "searched")


def merge_by_ties(args: argparse.Namespace) -> None:
    """TIES merges SFT and KTO, each from the student."""
    models = [f"{args.out}/sft", f"{args.out}/kto"]
    command = ["merge.py", "--method", "ties", "--models", *models, "--base", args.student, "--density", "0.5"]
    run_step(args.out, "ties", [*command, "--out", f"{args.out}/ties"])
    evaluate(args, "ties")


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
            fuse(args)
        elif arm == "ties":
            merge_by_ties(args)
        elif arm == "searched":
            fuse_at_searched_weight(args)
        else:
            sft(args, "sft-paper-lr", "1e-6", "data/sft.jsonl")
            evaluate(args, "sft-paper-lr")
            kto(args, "sft-kto-paper-lr", f"{args.out}/sft-paper-lr", "5e-8", "data/kto.jsonl")
            evaluate(args, "sft-kto-paper-lr")
    print("next: python -m experiments.own_responses, with the same flags")


if __name__ == "__main__":
    cli(main)
