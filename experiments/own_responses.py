"""Study 2, not in the paper: KTO after SFT on the SFT model's own responses, labelled by the same program.

    python -m experiments.own_responses --student smollm2-135m-instruct

In the paper, KTO after SFT learns from the responses that the student wrote before SFT.
"""

import shutil
from pathlib import Path

from core.files import cli
from experiments.steps import choose_lr, evaluate, kto, make_labels, study_flags


def main() -> None:
    args = study_flags(__doc__).parse_args()
    out = args.out
    if not Path(out, "own-data").exists():
        shutil.copytree(f"{out}/data", f"{out}/own-data")  # the replies of the teacher are in it
    make_labels(args, "own-data", f"{out}/sft")
    kto(args, "sft-kto-own", f"{out}/sft", choose_lr(args, "kto"), "own-data/kto.jsonl")
    evaluate(args, "sft-kto-own")
    print("next: python -m experiments.kto_parts, with the same flags")


if __name__ == "__main__":
    cli(main)
