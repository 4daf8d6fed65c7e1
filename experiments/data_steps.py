"""Study 3, the effect of verification: SFT on as many unverified replies, of the teacher or of any writer.

python -m experiments.data_steps --student smollm2-135m-instruct
"""

from core.files import cli
from experiments.steps import choose_lr, evaluate, sft, study_flags


def main() -> None:
    args = study_flags(__doc__).parse_args()
    for name in ("sft-teacher", "sft-random"):
        sft(args, name, choose_lr(args, "sft"), f"data/{name}.jsonl")
        evaluate(args, name)
    print("next: python -m experiments.kto_parts, with the same flags")


if __name__ == "__main__":
    cli(main)
