"""Study 7, general instructions: maths, multiple choice and code beside the constraints of the other studies.

    python -m experiments.general --student qwen0.5b --teacher qwen1.5b --data-dir data --out runs/study-0.5b

Answers and tests of the data sets verify the responses. OUT holds the data of experiments.data.
"""

from core.files import cli
from core.flags import at_least
from experiments.steps import choose_lr, command, evaluate, kto, make_labels, run_step, sft, study_flags

SOURCES = ("gsm8k/train.jsonl", "alpaca_cot/aqua_train.json", "mbpp/mbpp.jsonl")
BENCHMARKS = ("gsm8k/test.jsonl", "humaneval/HumanEval.jsonl.gz", "ifeval/input_data.jsonl")
REPLY_TOKENS = 256  # maximum tokens of a reply to learn from


def main() -> None:
    p = study_flags(__doc__)
    arms = ["sft", "kto", "sft-kto", "mean"]
    p.add_argument("--teacher", required=True, help="checkpoint that answers the instructions")
    p.add_argument("--data-dir", default="data", help="folder of the data sets' files")
    p.add_argument("--limit", type=at_least(1), default=150, help="maximum number of instructions of each data set")
    p.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms to run, in this order")
    args = p.parse_args()
    out, replies = args.out, f"{args.out}/general-teacher.jsonl"
    data = {
        "sources": [f"{args.data_dir}/{name}" for name in SOURCES],
        "decontaminate": [f"{args.data_dir}/{name}" for name in BENCHMARKS],
        "limit": args.limit,
        "max_new_tokens": REPLY_TOKENS,
        "hamming": 3,
        "allow_code_execution": True,
    }
    make_labels(args, "general-data", args.student, **data, dry_run=True)
    files = {"teacher": args.teacher, "prompts": f"{out}/general-data/2_dedup.jsonl", "out": replies}
    flags = {"max_new_tokens": REPLY_TOKENS, "batch_size": 64, "dtype": args.dtype}
    run_step(out, "general-teacher", command("experiments.teacher_replies", **files, **flags))
    make_labels(args, "general-data", args.student, **data, recorded=replies)
    sft_lr, kto_lr = choose_lr(args, "sft"), choose_lr(args, "kto")
    for arm in args.arms:
        name = f"general-{arm}"
        if arm == "sft":
            sft(args, name, sft_lr, "data/sft.jsonl", "general-data/sft.jsonl")
        elif arm == "kto":
            kto(args, name, args.student, kto_lr, "data/kto.jsonl", "general-data/kto.jsonl")
        elif arm == "sft-kto":
            kto(args, name, f"{out}/general-sft", kto_lr, "data/kto.jsonl", "general-data/kto.jsonl")
        else:
            models = [f"{out}/general-sft:0.5", f"{out}/general-sft-kto:0.5"]
            run_step(out, name, command("merge.py", method="linear", models=models, out=f"{out}/{name}"))
        evaluate(args, name)
    names = " ".join(f"general-{arm}" for arm in args.arms)
    print(f"next: python -m experiments.side_effects --arms {names}, with the same flags")


if __name__ == "__main__":
    cli(main)
