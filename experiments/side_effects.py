"""Study 6, what is lost: benchmarks that no arm was trained for, and perplexity of plain text.

python -m experiments.side_effects --student smollm2-135m-instruct --data-dir data
"""

from core.files import cli
from core.flags import at_least
from experiments.steps import run_step, study_flags

LIKELIHOOD = ("mmlu", "ceval", "perplexity")  # scored without a reply
REPLY_TOKENS = {"humaneval": 320, "gsm8k": 320, "ifeval": 160}  # maximum tokens of a reply


def main() -> None:
    p = study_flags(__doc__)
    tasks = [*LIKELIHOOD, *REPLY_TOKENS]
    p.add_argument("--data-dir", default="data", help="folder of the benchmarks' files")
    p.add_argument("--limit", type=at_least(1), default=500, help="maximum number of questions of MMLU, C-Eval, GSM8K")
    p.add_argument("--arms", nargs="+", default=["base", "sft", "kto", "sft-kto", "mean"], help="arms to evaluate")
    p.add_argument("--tasks", nargs="+", default=tasks, choices=tasks, help="benchmarks to run, in this order")
    args = p.parse_args()
    for task in args.tasks:
        for arm in args.arms:
            ckpt = args.student if arm == "base" else f"{args.out}/{arm}"
            if task in LIKELIHOOD:
                out = f"{args.out}/eval/kept/{arm}-{task}"
                more = ["--protocol", "loglik", "--limit", str(args.limit), "--out", out]
            else:
                out = f"{args.out}/eval/{task}/{arm}"
                more = ["--max-new-tokens", str(REPLY_TOKENS[task]), "--batch-size", "64", "--out", out]
                more += ["--limit", str(args.limit)] if task == "gsm8k" else []
                more += ["--allow-code-execution"] if task == "humaneval" else []
            common = ["--tasks", task, "--data-dir", args.data_dir, "--dtype", args.dtype]
            run_step(args.out, f"{task}-{arm}", ["eval.py", "--ckpt", ckpt, *common, *more])
    print("next: python -m experiments.collect --help")


if __name__ == "__main__":
    cli(main)
