"""Study 6, what is lost: MMLU and perplexity of plain text by likelihood, and IFEval itself, for the main arms.

python -m experiments.side_effects --student smollm2-135m-instruct --data-dir data
"""

from core.files import cli
from core.flags import at_least
from experiments.steps import run_step, study_flags


def main() -> None:
    p = study_flags(__doc__)
    p.add_argument("--data-dir", default="data", help="folder of the benchmarks' files")
    p.add_argument("--limit", type=at_least(1), default=500, help="MMLU questions")
    p.add_argument("--arms", nargs="+", default=["base", "sft", "kto", "sft-kto", "mean"], help="arms to evaluate")
    p.add_argument("--tasks", nargs="+", default=["mmlu", "ifeval"], choices=["mmlu", "perplexity", "ifeval"],
                   help="benchmarks that no arm was trained for")  # fmt: skip
    args = p.parse_args()
    for task in args.tasks:
        for arm in args.arms:
            ckpt = args.student if arm == "base" else f"{args.out}/{arm}"
            if task == "ifeval":
                out = f"{args.out}/eval/ifeval/{arm}"
                more = ["--max-new-tokens", str(args.max_new_tokens), "--batch-size", "64", "--out", out]
            else:
                out = f"{args.out}/eval/kept/{arm}-{task}"
                more = ["--protocol", "loglik", "--limit", str(args.limit), "--out", out]
            common = ["--tasks", task, "--data-dir", args.data_dir, "--dtype", args.dtype]
            run_step(args.out, f"{task}-{arm}", ["eval.py", "--ckpt", ckpt, *common, *more])
    print("next: python -m experiments.collect --help")


if __name__ == "__main__":
    cli(main)
