"""Study 6, side effects: benchmarks that no arm was trained for, and perplexity of plain text.

python -m experiments.side_effects --student smollm2-135m-instruct --data-dir data
"""

from core.files import cli
from core.flags import at_least
from experiments.steps import command, run_step, study_flags

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
            flags = {"ckpt": ckpt, "tasks": task, "data_dir": args.data_dir, "dtype": args.dtype}
            limit = {"limit": args.limit}
            if task in LIKELIHOOD:
                flags |= {"protocol": "loglik", **limit, "out": f"{args.out}/eval/kept/{arm}-{task}"}
            else:
                flags |= {
                    "max_new_tokens": REPLY_TOKENS[task],
                    "batch_size": 64,
                    "out": f"{args.out}/eval/{task}/{arm}",
                }
                flags |= {"gsm8k": limit, "humaneval": {"allow_code_execution": True}}.get(task, {})
            run_step(args.out, f"{task}-{arm}", command("eval.py", **flags))
    print("next: python -m experiments.collect --help")


if __name__ == "__main__":
    cli(main)
