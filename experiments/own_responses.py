"""Study 2, beyond the paper: KTO after SFT on responses of the SFT model itself, labelled by the same program.

    python -m experiments.own_responses --student smollm2-135m-instruct --judge qwen0.5b

In the paper, KTO after SFT learns from the responses that the student wrote before SFT.
"""

from core.files import cli
from core.flags import at_least
from experiments.steps import choose_lr, evaluate, kto, run_step, study_flags


def main() -> None:
    p = study_flags(__doc__)
    p.add_argument("--judge", required=True, help="checkpoint that sorts instructions and grades safety")
    p.add_argument("--reply-tokens", type=at_least(1), default=100, help="most tokens of a reply to learn from")
    args = p.parse_args()
    out, instructions = args.out, f"{args.out}/instructions/train/ifeval/input_data.jsonl"
    run_step(out, "own-data", [
        "make_data.py", "--sources", instructions, "--trust-references", instructions, "--teacher", args.judge,
        "--small", f"{out}/sft", "--samples", "4", "--recorded", f"{out}/teacher-all.jsonl", "--out", f"{out}/own-data",
        "--batch-size", "96", "--dtype", args.dtype, "--max-new-tokens", str(args.reply_tokens), "--hamming", "0",
        "--min-category", "1", "--margin", "1.5", "--min-safety", "1", "--judge-orders", "1",
    ])  # fmt: skip
    kto(args, "sft-kto-own", f"{out}/sft", choose_lr(args, "kto"), "own-data/kto.jsonl")
    evaluate(args, "sft-kto-own")
    print("next: python -m experiments.kto_parts, with the same flags")


if __name__ == "__main__":
    cli(main)
