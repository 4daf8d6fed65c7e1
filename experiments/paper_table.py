"""Study 1, the paper's table: SFT, KTO, SFT then KTO, and fusions of them, beside the student as it was.

    python -m experiments.paper_table --student smollm2-135m-instruct

The learning rates are chosen on the dev split. The paper's own (1e-6 and 5e-8, for a 0.5B model) are run beside them.
"""

import argparse

from core.files import cli
from experiments.steps import choose_lr, evaluate, kto, run_step, sft, study_flags


def fuse(args: argparse.Namespace) -> None:
    """The paper's fusions: A (SFT) with B (SFT then KTO). TIES merges SFT and KTO, each from the student."""
    a, b, kto_alone = (f"{args.out}/{name}" for name in ("sft", "sft-kto", "kto"))
    linear = ["merge.py", "--method", "linear", "--models"]
    run_step(args.out, "mean", [*linear, f"{a}:0.5", f"{b}:0.5", "--out", f"{args.out}/mean"])
    run_step(args.out, "mean-05-95", [*linear, f"{a}:0.05", f"{b}:0.95", "--out", f"{args.out}/mean-05-95"])
    ties = ["merge.py", "--method", "ties", "--models", a, kto_alone, "--base", args.student, "--density", "0.5"]
    run_step(args.out, "ties", [*ties, "--out", f"{args.out}/ties"])
    for name in ("mean", "mean-05-95", "ties"):
        evaluate(args, name)


def main() -> None:
    p = study_flags(__doc__)
    arms = ["base", "sft", "kto", "sft-kto", "fusions", "paper-lr"]
    p.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms to run, in this order")
    args = p.parse_args()
    for arm in args.arms:
        if arm == "base":
            evaluate(args, "base", ckpt=args.student)
        elif arm in ("sft", "kto"):
            choose_lr(args, arm)
            evaluate(args, arm)
        elif arm == "sft-kto":
            kto(args, "sft-kto", f"{args.out}/sft", choose_lr(args, "kto"), "data/kto.jsonl")
            evaluate(args, "sft-kto")
        elif arm == "fusions":
            fuse(args)
        else:
            sft(args, "sft-paper-lr", "1e-6", "data/sft.jsonl")
            kto(args, "sft-kto-paper-lr", f"{args.out}/sft-paper-lr", "5e-8", "data/kto.jsonl")
            evaluate(args, "sft-paper-lr")
            evaluate(args, "sft-kto-paper-lr")
    print("next: python -m experiments.own_responses, with the same flags")


if __name__ == "__main__":
    cli(main)
