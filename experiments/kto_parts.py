"""Study 4, the effect of KTO's parts: wrong labels, no undesirable examples, no z0, SFT on the same tokens.

    python -m experiments.kto_parts --student smollm2-135m-instruct

The KTO arms start from the student and use the learning rate of the arm `kto`. `sft-sft` continues the SFT model, as
`sft-kto` does, but with SFT on the desirable examples. Two passes over this half of the rows are as many examples as
KTO sees.
"""

from core.files import cli
from experiments.steps import choose_lr, evaluate, kto, sft, study_flags


def main() -> None:
    p = study_flags(__doc__)
    arms = ["sft-sft", "kto-noise-30", "kto-no-z0", "kto-desirable", "sft-desirable", "kto-noise-10"]
    p.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms to run, in this order")
    args = p.parse_args()
    lr = choose_lr(args, "kto")
    for name in args.arms:
        if name == "sft-desirable":
            sft(args, name, choose_lr(args, "sft"), "data/kto-desirable.jsonl")
        elif name == "sft-sft":
            sft(args, name, choose_lr(args, "sft"), "data/kto-desirable.jsonl", ckpt=f"{args.out}/sft")
        elif name == "kto-no-z0":
            kto(args, name, args.student, lr, "data/kto.jsonl", script="experiments.kto_no_z0")
        else:
            kto(args, name, args.student, lr, f"data/{name}.jsonl")
        evaluate(args, name)
    print("next: python -m experiments.report")


if __name__ == "__main__":
    cli(main)
