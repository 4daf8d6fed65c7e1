"""The flags of train_sft.py and train_kto.py. Does not import torch, as in core/flags.py."""

import argparse
import os
from collections.abc import Callable

from core.files import InputError, is_main
from core.flags import FlagGroup, Parser, add_device_flags, at_least, checkpoint_out, number
from core.outputs import check_writable, is_inside

# Tensor sizes differ between micro-batches; this lets torch reuse freed memory for other sizes. torch may read the
# variable only once, so it is set here: the training scripts import this module before torch.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

WRITTEN_BY = {  # default inputs, and the command that writes each
    "data/sft.jsonl": "python make_data.py",
    "data/kto.jsonl": "python make_data.py",
    "sft.pt": "python train_sft.py",
}


def parse_sft_args(
    argv: list[str] | None = None, add_flags: Callable[[Parser], None] | None = None, no_shard: str = ""
) -> argparse.Namespace:
    """Parses train_sft.py's arguments. add_flags(parser): adds further flags, or changes defaults and description.

    no_shard: why the method does not work with --shard.
    """
    p = Parser(description="Supervised fine-tuning in plain PyTorch.")
    # the paper's epochs, batch size and learning rate
    add_training_flags(p, "Qwen/Qwen2-0.5B-Instruct", "data/sft.jsonl", "sft.pt", epochs=3, batch_size=1000, lr=1e-6)
    p.set_defaults(method="supervised fine-tuning")
    last = "train on the last reply of each conversation only"
    p.add_argument_group("SFT").add_argument("--last-turn-only", action="store_true", help=last)
    if add_flags:
        add_flags(p)
    args = p.parse_args(argv)
    if args.shard and no_shard:
        raise InputError(f"--shard: {no_shard}; leave it out")
    check_default_inputs(args)
    return args


def parse_kto_args(
    argv: list[str] | None = None, add_flags: Callable[[Parser], None] | None = None
) -> argparse.Namespace:
    """Parses train_kto.py's arguments. add_flags: as in parse_sft_args."""
    p = Parser(description="KTO, alignment from desirable and undesirable completions (arXiv 2402.01306).")
    # the paper does not give its settings for KTO; the learning rate and beta are TRL's
    add_training_flags(p, "sft.pt", "data/kto.jsonl", None, epochs=1, batch_size=64, lr=1e-6)
    p.set_defaults(method="KTO (arXiv 2402.01306)")
    kto = p.add_argument_group("KTO")
    add_reference_flags(kto)
    w_d = "weight w_D of desirable examples; auto balances the labels"
    kto.add_argument("--desirable-weight", type=number_or_auto, default=1.0, help=w_d)
    kto.add_argument("--undesirable-weight", type=number(0), default=1.0, help="weight w_U of undesirable examples")
    if add_flags:
        add_flags(p)
    args = p.parse_args(argv)
    if args.batch_size < 2:
        raise InputError("--batch-size 1: a KL pair takes two examples; give at least 2")
    complete_reference_args(args, "kto")
    return args


def add_training_flags(
    p: Parser, ckpt: str, data: str, out: str | None, epochs: int, batch_size: int, lr: float, suffix: str = "kto"
) -> None:
    """Adds the flags. The other arguments are the script's defaults. out=None: default_out(--ckpt, suffix)."""
    add = p.add_argument_group("checkpoints").add_argument
    add("--ckpt", default=ckpt, help="model to start from: hub id, folder or .pt file")
    note = "" if out else f" (default: --ckpt with -{suffix} in its name)"
    add("--out", type=checkpoint_out, default=out, help=f"checkpoint to write: folder or .pt file{note}")

    add = p.add_argument_group("data").add_argument
    add("--data", nargs="+", default=[data], help=f"data files to train on (default: {data})")
    add("--eval-data", nargs="+", help="held-out data files, evaluated in training")
    max_len = "maximum length of an example, in tokens; longer ones are cut at the end"
    add("--max-len", type=at_least(2), default=1024, help=max_len)
    add("--no-shuffle", action="store_true", help="keep the order of the files in every epoch")
    add("--seed", type=int, default=0, help="seed of the data order and of torch's random numbers")

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=at_least(1), default=epochs, help="passes over the data")
    add("--max-steps", type=at_least(1), help="optimizer steps; overrides --epochs")
    add("--batch-size", type=at_least(1), default=batch_size, help="examples per step, all ranks together")
    peak = "peak learning rate; a few hundred examples need a larger one, see docs/REPORT.md, sections 1 and 7"
    add("--lr", type=number(0), default=lr, help=peak)
    schedules = ["cosine", "linear", "constant"]
    add("--schedule", choices=schedules, default="cosine", help="learning-rate schedule")
    rises = "number of steps in which the learning rate rises from 0 (default: a tenth of the steps, at most 10)"
    add("--warmup", type=at_least(0), help=rises)
    add("--weight-decay", type=number(0), default=0.0, help="AdamW's weight decay, on matrices only")
    add("--beta1", type=number(0, below=1), default=0.9, help="AdamW's decay of the first moment")
    add("--beta2", type=number(0, below=1), default=0.999, help="AdamW's decay of the second moment")
    add("--eps", type=number(0), default=1e-8, help="AdamW's epsilon")
    add("--clip", type=number(0), default=1.0, help="maximum gradient norm; 0 turns clipping off")
    skips = "stop with an error after this many steps in a row with a loss or gradient that is not finite"
    add("--max-skips", type=at_least(1), default=3, help=skips)

    machine = p.add_argument_group("machine")
    add = machine.add_argument
    micro_tokens = "maximum tokens of one forward (default: 16384 on a GPU, else 1024)"
    add("--micro-tokens", type=at_least(1), help=micro_tokens)
    add_device_flags(machine, "compute dtype; the weights stay fp32")
    when = "torch.compile the blocks; auto: on a CPU, if the run is long enough to repay half a minute of compilation"
    add("--compile", nargs="?", choices=["auto", "on", "off"], default="auto", const="on", help=when)
    add("--shard", action="store_true", help="split weights and optimizer state over the ranks (FSDP2)")
    again = (
        "recompute the blocks in the backward to save memory; auto: only if a step would not fit otherwise. "
        "The estimate assumes the fused kernels and this script's own loss"
    )
    ways = ["auto", "on", "off"]
    add("--activation-checkpointing", nargs="?", choices=ways, default="auto", const="on", help=again)

    add = p.add_argument_group("saving and evaluation").add_argument
    every = "steps between saves into OUT.run/; 0 saves at the end only"
    add("--save-every", type=at_least(0), default=100, help=every)
    add("--keep", type=at_least(1), default=2, help="newest saves to keep; with --eval-every also the best")
    every = "steps between evaluations; 0 evaluates at the end only"
    add("--eval-every", type=at_least(0), default=0, help=every)
    add("--resume", action="store_true", help="continue from the last save in OUT.run/")
    add("--tensorboard", action="store_true", help="also write the log as TensorBoard event files")


def add_reference_flags(p: FlagGroup) -> None:
    """Adds the flags of the methods that compare with a reference model: KTO, DPO."""
    p.add_argument("--ref", help="reference checkpoint; without it, the model before training")
    pull = "strength of the pull towards the reference, per nat"
    p.add_argument("--beta", type=number(above=0), default=0.1, help=pull)
    cache = "file of reference log-probabilities (default: ref-cache.safetensors beside OUT)"
    p.add_argument("--ref-cache", help=cache)


def complete_reference_args(args: argparse.Namespace, suffix: str) -> None:
    """Sets the default --out (see default_out). InputError if a default input is missing or --ref-cache is unusable."""
    args.out = args.out or checkpoint_out(default_out(args.ckpt, suffix))
    check_default_inputs(args)
    check_cache_path(args)


def number_or_auto(text: str) -> float | str:
    """An argparse type: a number of at least 0, or "auto"."""
    return text if text == "auto" else number(0)(text)


def check_default_inputs(args: argparse.Namespace) -> None:
    """InputError if an input with a default name is missing. The message names the command that writes it."""
    for flag, paths in (("--data", args.data), ("--ckpt", [args.ckpt])):
        for path in paths:
            if path in WRITTEN_BY and not os.path.exists(path):
                raise InputError(f"{path}: no such file; {WRITTEN_BY[path]} writes it, or give {flag}")


def default_out(ckpt: str, suffix: str = "kto") -> str:
    """--ckpt with a suffix: sft.pt -> sft-kto.pt, runs/sft/ -> runs/sft-kto, Qwen/Qwen2-0.5B -> Qwen2-0.5B-kto."""
    if not os.path.exists(ckpt) and not ckpt.endswith(".pt"):  # a hub id
        return os.path.basename(ckpt.rstrip("/")) + f"-{suffix}"
    if not os.path.basename(os.path.normpath(ckpt)).strip("."):  # the current folder or a parent of it
        ckpt = os.path.realpath(ckpt)
    if ckpt.endswith(".pt"):
        return f"{ckpt[:-3]}-{suffix}.pt"
    return f"{os.path.normpath(ckpt)}-{suffix}"


def cache_path(args: argparse.Namespace) -> str:
    """--ref-cache, or else ref-cache.safetensors beside OUT."""
    return args.ref_cache or os.path.join(os.path.dirname(os.path.abspath(args.out)), "ref-cache.safetensors")


def check_cache_path(args: argparse.Namespace) -> None:
    """InputError if the cache is no regular file, is among the run's own files, or cannot be written.

    Called before the work begins.
    """
    path = cache_path(args)
    if os.path.isdir(path):
        raise InputError(f"--ref-cache {path}: is a folder; give a file, such as {path}/ref-cache.safetensors")
    if os.path.lexists(os.path.realpath(path)) and not os.path.isfile(path):
        raise InputError(f"--ref-cache {path}: is not a regular file; give another name")
    for own in (args.out, f"{args.out}.run"):
        if is_inside(path, own):  # the run could not write its own files there
            raise InputError(f"--ref-cache {path}: is {own} or inside it, where the run writes; give another name")
    if is_main() and not os.path.isfile(path):  # an existing cache may be complete and read-only
        check_writable(path, "--ref-cache")
