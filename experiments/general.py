"""General instructions: maths, multiple choice and code beside the constraints of the other studies.

    python -m experiments.general --student qwen0.5b --teacher qwen1.5b --data-dir data --out runs/study-0.5b

Answers and tests of the data sets verify the responses. OUT holds the data of experiments.data. The arms named own-
learn from the models' replies alone: the student's where it is right, else the teacher's, never the original response.
"""

import argparse
import shutil
from pathlib import Path

from core.files import cli
from core.flags import at_least
from experiments.steps import choose_lr, command, evaluate, kto, make_labels, run_step, sft, study_flags

SOURCES = ("gsm8k/train.jsonl", "alpaca_cot/aqua_train.json", "mbpp/mbpp.jsonl")
BENCHMARKS = ("gsm8k/test.jsonl", "humaneval/HumanEval.jsonl.gz", "ifeval/input_data.jsonl")
DATA, OWN_DATA = "general-data", "general-own-data"  # folders in OUT
REPLY_TOKENS = 256  # maximum tokens of a reply to learn from


def make_general_data(args: argparse.Namespace) -> None:
    """Writes OUT/general-data, and OUT/general-own-data from the same replies without the original responses."""
    out, replies = args.out, f"{args.out}/general-teacher.jsonl"
    data = {
        "sources": [f"{args.data_dir}/{name}" for name in SOURCES],
        "decontaminate": [f"{args.data_dir}/{name}" for name in BENCHMARKS],
        "limit": args.limit,
        "max_new_tokens": REPLY_TOKENS,
        "hamming": 3,
        "allow_code_execution": True,
    }
    make_labels(args, DATA, args.student, **data, dry_run=True)
    files = {"teacher": args.teacher, "prompts": f"{out}/{DATA}/2_dedup.jsonl", "out": replies}
    flags = {"max_new_tokens": REPLY_TOKENS, "batch_size": 64, "dtype": args.dtype}
    run_step(out, "general-teacher", command("experiments.teacher_replies", **files, **flags))
    make_labels(args, DATA, args.student, **data, recorded=replies)
    if not Path(out, OWN_DATA).exists():  # its replies are taken over, so only the labels are made anew
        shutil.copytree(Path(out, DATA), Path(out, OWN_DATA))
    make_labels(args, OWN_DATA, args.student, **data, recorded=replies, writers=["small", "teacher"])


def train_arm(args: argparse.Namespace, arm: str, data: str, rates: dict[str, str]) -> None:
    """Trains general-ARM on the constraints and on OUT/DATA. rates: {"sft", "kto": learning rate}."""
    out, name = args.out, f"general-{arm}"
    if arm.endswith("kto"):
        ckpt = f"{out}/{name.removesuffix('-kto')}" if arm.endswith("sft-kto") else args.student
        kto(args, name, ckpt, rates["kto"], "data/kto.jsonl", f"{data}/kto.jsonl")
    elif arm.endswith("mean"):
        models = [f"{out}/general-sft:0.5", f"{out}/general-sft-kto:0.5"]
        run_step(out, name, command("merge.py", method="linear", models=models, out=f"{out}/{name}"))
    else:
        sft(args, name, rates["sft"], "data/sft.jsonl", f"{data}/sft.jsonl")


def main() -> None:
    p = study_flags(__doc__)
    arms = ["sft", "kto", "sft-kto", "mean", "own-sft", "own-kto", "own-sft-kto"]
    p.add_argument("--teacher", required=True, help="checkpoint that answers the instructions")
    p.add_argument("--data-dir", default="data", help="folder of the data sets' files")
    p.add_argument("--limit", type=at_least(1), default=150, help="maximum number of instructions of each data set")
    p.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms to run, in this order")
    args = p.parse_args()
    make_general_data(args)
    rates = {kind: choose_lr(args, kind) for kind in ("sft", "kto")}
    for arm in args.arms:
        train_arm(args, arm, OWN_DATA if arm.startswith("own-") else DATA, rates)
        evaluate(args, f"general-{arm}")
    names = " ".join(f"general-{arm}" for arm in args.arms)
    print(f"next: python -m experiments.side_effects --arms {names}, with the same flags")


if __name__ == "__main__":
    cli(main)
