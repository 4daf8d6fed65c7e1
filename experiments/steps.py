"""Runs the project's own commands as the steps of a study. Finished steps are skipped; interrupted ones continue."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from core.files import InputError, atomic_write
from core.flags import Parser, at_least, number
from experiments.stand_in import stand_in


def study_flags(description: str) -> Parser:
    """The flags that all studies share."""
    p = Parser(description=description)
    add = p.add_argument
    # where
    add("--out", default="runs/study", help="folder of all studies: data, checkpoints, replies")
    add("--student", required=True, help="checkpoint to train")
    # training
    add("--sft-lrs", nargs="+", default=["1e-5", "5e-5"], help="learning rates of SFT to choose from")
    add("--kto-lrs", nargs="+", default=["2e-6", "1e-5"], help="learning rates of KTO to choose from")
    add("--sft-epochs", type=at_least(1), default=2, help="passes of SFT over its data")
    add("--batch-size", type=at_least(2), default=16, help="examples per step")
    add("--beta", type=number(above=0), default=0.1, help="KTO's beta, per nat")
    add("--seed", type=int, default=0, help="random seed of training and sampling")
    # data and evaluation
    add("--reply-tokens", type=at_least(1), default=100, help="maximum tokens of a reply to learn from")
    add("--max-new-tokens", type=at_least(1), default=160, help="maximum tokens of an evaluated reply")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="compute dtype")
    return p


def command(script: str, **flags: object) -> list[str]:
    """The words of a command after `python`. A module gets -m. max_len=8 becomes --max-len 8, True only the flag."""
    first = script.partition(" ")[0]
    words = [*([] if first.endswith(".py") else ["-m"]), *script.split()]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def run_step(out: str, name: str, words: list[str], hidden: tuple[str, ...] = ()) -> None:
    """Runs `python WORDS HIDDEN` unless OUT/steps/NAME.json records that WORDS are done."""
    stamp = Path(out, "steps", f"{name}.json")
    if stamp.exists() and json.loads(stamp.read_text())["command"] == words:
        print(f"{name}: done before", flush=True)
        return
    resume = ["--resume"] if words[0] != "merge.py" and Path(out, f"{name}.run", "state.json").exists() else []
    print(f"{name}: python {' '.join([*words, *resume])}", flush=True)
    start = time.time()
    code = subprocess.run([sys.executable, *words, *hidden, *resume]).returncode
    if code:
        raise InputError(
            f"{name}: the command above ended with exit code {code}; fix the cause and run the study again"
        )
    with atomic_write(stamp) as f:
        json.dump({"command": words, "seconds": round(time.time() - start, 1)}, f)


def make_labels(
    args: argparse.Namespace, name: str, small: str, sources: list[str] | None = None, **more: object
) -> None:
    """Writes OUT/NAME/sft.jsonl and kto.jsonl: four responses of `small` per instruction, labelled by program.

    sources: files of instructions, in place of the training instructions. more: further flags of make_data.py. With
    dry_run=True, only collects the instructions.
    """
    sources = sources or [f"{args.out}/instructions/train/ifeval/input_data.jsonl"]
    flags = {
        "sources": sources,
        "trust_references": sources,
        "teacher_model": "stand-in",
        "small": small,
        "samples": 4,
        "out": f"{args.out}/{name}",
        "dtype": args.dtype,
        "batch_size": 96,
        "max_new_tokens": args.reply_tokens,
        "hamming": 0,
        "min_category": 1,
        "margin": 1.5,
        "judge_orders": 1,
        "recorded": f"{args.out}/teacher.jsonl",
    }
    step = f"{name}-prompts" if "dry_run" in more else name
    with stand_in() as url:
        run_step(args.out, step, command("make_data.py", **(flags | more)), hidden=("--teacher", url))


def sft(
    args: argparse.Namespace, name: str, lr: str, *data: str, ckpt: str = "", script: str = "", **more: str
) -> None:
    """Trains the arm `name`: SFT of the student, or of ckpt, on files in OUT. script: a module with another loss."""
    files = {"ckpt": ckpt or args.student, "data": [f"{args.out}/{path}" for path in data], "out": f"{args.out}/{name}"}
    flags = {"lr": lr, "epochs": args.sft_epochs, **training_flags(args), **more}
    run_step(args.out, name, command(script or "train_sft.py", **files, **flags))


def kto(args: argparse.Namespace, name: str, ckpt: str, lr: str, *data: str, script: str = "") -> None:
    """Trains the arm `name`: one pass of KTO on files in OUT. script: a module with another loss."""
    files = {"ckpt": ckpt, "data": [f"{args.out}/{path}" for path in data], "out": f"{args.out}/{name}"}
    flags = {"lr": lr, "beta": args.beta, "desirable_weight": "auto", **training_flags(args)}
    run_step(args.out, name, command(script or "train_kto.py", **files, **flags))


def training_flags(args: argparse.Namespace, batch_size: int = 0) -> dict[str, object]:
    """The flags that all training runs share. batch_size: replaces --batch-size if examples are pairs."""
    batch = {"batch_size": batch_size or args.batch_size, "warmup": 5}
    return {**batch, "seed": args.seed, "dtype": args.dtype, "save_every": 0}


def evaluate(args: argparse.Namespace, name: str, split: str = "test", ckpt: str = "") -> float:
    """Evaluates an arm in OUT/eval/SPLIT/NAME. -> the share of the split's instructions that it follows."""
    folder = f"{args.out}/eval/{split}/{name}"
    words = command(
        "eval.py",
        ckpt=ckpt or f"{args.out}/{name}",
        tasks="ifeval",
        dtype=args.dtype,
        batch_size=64,
        data_dir=f"{args.out}/instructions/{split}",
        max_new_tokens=args.max_new_tokens,
        out=folder,
    )
    run_step(args.out, f"eval-{split}-{name}", words)
    (cells,) = json.loads(Path(folder, "results.json").read_text()).values()
    return cells["ifeval"]["score"]


def train_from_student(args: argparse.Namespace, kind: str, lr: str) -> None:
    """Trains the arm `KIND-LR`. kind: "sft" or "kto"."""
    if kind == "sft":
        sft(args, f"sft-{lr}", lr, "data/sft.jsonl")
    else:
        kto(args, f"kto-{lr}", args.student, lr, "data/kto.jsonl")


def choose_lr(args: argparse.Namespace, kind: str) -> str:
    """Trains an arm `KIND-LR` for each rate. -> the rate that is best on the dev split, the smaller one on a tie.

    A single rate is returned without training.
    """
    rates = sorted(args.sft_lrs if kind == "sft" else args.kto_lrs, key=float)
    if len(rates) == 1:
        return rates[0]
    scores = {}
    for lr in rates:
        train_from_student(args, kind, lr)
        scores[lr] = evaluate(args, f"{kind}-{lr}", "dev")
    best = max(rates, key=lambda lr: scores[lr])
    with atomic_write(Path(args.out, f"chosen-{kind}.json")) as f:
        json.dump({"lr": best, "dev": scores}, f)
    return best


def train_chosen(args: argparse.Namespace, kind: str) -> None:
    """Trains the arm of the chosen rate and links OUT/KIND to it."""
    lr = choose_lr(args, kind)
    train_from_student(args, kind, lr)
    for suffix in ("", ".run"):
        link = Path(args.out, f"{kind}{suffix}")
        link.unlink(missing_ok=True)
        link.symlink_to(f"{kind}-{lr}{suffix}")
