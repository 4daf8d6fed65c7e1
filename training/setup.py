"""Sets up a training run before its first step: ranks, batches, model, memory."""

import argparse
import functools
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.utils.checkpoint

from core.casts import cast_copies
from core.checkpoint import Checkpoint
from core.devices import DTYPES, choose_device
from core.distributed import (
    STOP,
    Ranks,
    is_main,
    is_sharded,
    join_ranks,
    load_into,
    shard,
    split_by_tokens,
    sum_over_ranks,
)
from core.files import InputError, print0, same_path, shown
from core.outputs import check_inputs
from core.pages import GIB, free_memory
from core.tokenizer import Tokenizer
from model import Qwen2, check_finite
from training.log import require_tensorboard
from training.memory import forward_flops, memory_needed
from training.saves import check_not_running

# ---------------------------------------------------------------------------------------------------------------------
# Ranks and random numbers


def setup_ranks(args: argparse.Namespace) -> Ranks:
    """Joins the ranks and seeds all of them equally. Sets the flags whose defaults depend on the device.

    InputError if another run is writing to the same --out.
    """
    choose_device(args)
    args.micro_tokens = args.micro_tokens or (1024 if args.device == "cpu" else 16384)
    if args.tensorboard:
        require_tensorboard()
    if is_main():
        check_not_running(args.out)
    ranks = join_ranks(args.device, hours=1, nccl=True)  # NCCL's default of 10 minutes may be too short for a save
    if args.shard and not dist.is_initialized():
        raise InputError("--shard: splits the model over torchrun's ranks; start the script with torchrun")
    STOP.update(training=False, asked=0)
    seed_all(args.seed)
    return ranks


def seed_all(*seeds: int) -> None:
    """Seeds torch (CPU and GPU) and Python's random from the given integers."""
    rng = random.Random(" ".join(map(str, seeds)))
    torch.manual_seed(rng.getrandbits(63))
    random.seed(rng.getrandbits(63))


# ---------------------------------------------------------------------------------------------------------------------
# Batches of indices, drawn before training starts


def plan_steps(
    n: int,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    smallest: int = 1,
    order: Callable[[int, list[int]], list[int]] | None = None,
) -> list[list[int]]:
    """The batches of the whole run: a list of steps, each a list of indices into the n examples.

    order(epoch, sizes) returns the permutation of an epoch; sizes are the epoch's batch sizes. Without it, every epoch
    keeps the order of the data. The last batch of an epoch may be smaller. If it has fewer than `smallest` examples, it
    joins the batch before it. max_steps, if given, overrides epochs.
    """
    sizes = [batch_size] * (n // batch_size) + ([n % batch_size] if n % batch_size else [])
    if sizes[-1] < smallest and len(sizes) > 1:
        last = sizes.pop()
        sizes[-1] += last
    steps, epoch = [], 0
    while len(steps) < max_steps if max_steps else epoch < epochs:
        indices = order(epoch, sizes) if order else list(range(n))
        for size in sizes:
            steps.append(indices[:size])
            indices = indices[size:]
        epoch += 1
    return steps[:max_steps] if max_steps else steps


def shuffled_order(n: int, seed: int) -> Callable[[int, list[int]], list[int]]:
    """An `order` for plan_steps: a new permutation in every epoch, determined by the seed."""

    def order(epoch, sizes):
        indices = list(range(n))
        random.Random(f"{seed} {epoch}").shuffle(indices)
        return indices

    return order


def plan_warmup(args: argparse.Namespace, steps: list) -> None:
    """Sets args.warmup if --warmup was not given: the paper's 10 steps, or a tenth of a run of fewer than 100 steps.

    Warns if the steps are too few, or all of them warmup.
    """
    if args.warmup is None:
        args.warmup = min(10, len(steps) // 10)
        if args.warmup < 10:
            print0(f"warmup: {args.warmup} of {len(steps)} steps; --warmup changes it")
        if len(steps) < 10 and not args.max_steps:
            few = f"warning: only {len(steps)} steps; few examples need a smaller --batch-size and a larger --lr"
            print0(f"{few}, see docs/REPORT.md")
    elif len(steps) <= args.warmup:
        print0(f"warning: all {len(steps)} steps are warmup; lower --warmup or --batch-size")


# ---------------------------------------------------------------------------------------------------------------------
# Models


@dataclass
class Setup:
    """A run's data and model before the optimizer exists. The prepare function of train_sft.main receives it."""

    args: argparse.Namespace
    ranks: Ranks
    model: Qwen2
    tokenizer: Tokenizer
    ckpt: Checkpoint  # the checkpoint of --ckpt, open
    examples: list = field(default_factory=list)  # SFT: (ids, supervised); KTO: (prompt ids, completion ids, label)
    places: list = field(default_factory=list)  # "file:line" of each example
    steps: list = field(default_factory=list)  # plan_steps: the indices of each step's examples
    records: list = field(default_factory=list)  # SFT: ("file:line", messages) of --data, also of dropped examples
    prepared: object = None  # SFT: what `prepare` returned


def load_model(ckpt: Checkpoint, args: argparse.Namespace, device: str) -> Qwen2:
    """The model of a checkpoint: fp32 weights, computation in --dtype; with --shard, split over the ranks."""
    dtype = DTYPES[args.dtype]
    model = Qwen2.from_pretrained(ckpt, torch.float32, "meta" if args.shard else device)
    if args.shard:  # no rank ever holds the whole model
        shard(model, device, dtype)
        model.to_empty(device=device)
        for name, p in model.named_parameters():
            load_into(p, check_finite(ckpt, name, ckpt.tensor(name)))
    model.compute_dtype = dtype
    if args.compile == "on":
        model.compile()
    return model


def load_frozen(ckpt: Checkpoint, args: argparse.Namespace, ranks: Ranks) -> Qwen2:
    """A frozen copy of a checkpoint's model, for a loss that needs the reference model during training.

    Do not use the policy instead: its KL to itself is always 0.
    """
    return load_model(ckpt, args, ranks.device).eval().requires_grad_(False)


def open_checkpoint(args: argparse.Namespace, ranks: Ranks) -> tuple[Qwen2, Tokenizer, Checkpoint]:
    """Opens --ckpt. Lowers args.max_len to the model's number of positions if it is larger."""
    for flag, path in (("ckpt", args.ckpt), ("ref", getattr(args, "ref", None))):
        if path and (
            same_path(args.out, path) or same_path(f"{args.out}.run", os.path.dirname(os.path.realpath(path)))
        ):
            where = f"the checkpoint of --{flag}, which is there or in {args.out}.run"
            raise InputError(f"--out {args.out}: the run would overwrite {where}; give another name")
    check_inputs(args.out, [path for path in (args.ckpt, getattr(args, "ref", None)) if path])
    ckpt = Checkpoint(args.ckpt)
    tokenizer, model = Tokenizer(ckpt), load_model(ckpt, args, ranks.device)
    positions = model.config.max_position_embeddings
    if args.max_len > positions:
        args.max_len = positions
        print0(f"--max-len: the model has {positions} positions; longer examples are cut there")
    if dropout := model.raw_config.get("attention_dropout"):
        where = f"{ckpt.source}/config.json: attention_dropout is {shown(dropout)}"
        print0(f"warning: {where}; dropout is not implemented, so this run trains without it")
    return model, tokenizer, ckpt


# ---------------------------------------------------------------------------------------------------------------------
# Memory


# Compilation takes about 30 s and saves about a tenth of a step, so it pays after 300 s of training. At 200 GFLOP/s, a
# fast rate for two cores, that is 0.6e14 FLOPs. The threshold is twice that, to be safe.
COMPILE_PAYS = 1.2e14


def compile_pays(model: Qwen2, batches: list[list[int]], ranks: Ranks) -> bool:
    """True if --compile auto compiles: for long runs on a CPU with a C++ compiler. GPUs have not been measured."""
    if model.device.type != "cpu" or not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return False
    per_step = (forward_flops(model.config, lengths, sum(lengths) // 2) for lengths in batches)
    return 3 * sum(per_step) / ranks.world > COMPILE_PAYS


def prepare_blocks(model: Qwen2, args: argparse.Namespace, batches: Iterable[list[int]], ranks: Ranks) -> None:
    """Applies --compile and --activation-checkpointing to the blocks. "auto" decides from the planned run.

    batches: the lengths of each step's examples. Sets args.compile to "on" or "off".
    """
    batches = list(batches)
    if args.compile == "auto":
        args.compile = "on" if compile_pays(model, batches, ranks) else "off"
        if args.compile == "on":
            model.compile()
            print0("compile: on, the planned run is long enough to pay for it; --compile off switches it off")
    checkpoint_activations(model, args, batches, ranks)


def checkpoint_activations(model: Qwen2, args: argparse.Namespace, batches: list[list[int]], ranks: Ranks) -> None:
    """Applies --activation-checkpointing. "auto" turns it on only if a step would not fit without it."""
    on = args.activation_checkpointing == "on"
    if args.activation_checkpointing == "auto":
        largest = 0  # tokens of the largest micro-batch; 1,000 steps give nearly the maximum
        for lengths in batches[:1000]:
            first, *_ = split_by_tokens(lengths, args.micro_tokens, ranks.world)
            largest = max(largest, sum(lengths[i] for i in first))
        on = plan_memory(model, args, largest, ranks)
    if on:
        for block in model.model["layers"]:
            recompute(block)


def plan_memory(model: Qwen2, args: argparse.Namespace, tokens: int, ranks: Ranks) -> bool:
    """Estimates the memory of a micro-batch of `tokens` tokens and prints it. -> True if checkpointing is needed.

    It is needed if the micro-batch does not fit on some rank without it. A tenth of the free memory is reserved for
    what memory_needed does not count. spend_spare_memory gets the rest.
    """
    settings = {
        "itemsize": DTYPES[args.dtype].itemsize,
        "shards": ranks.world if is_sharded(model) else 1,
        "device_type": model.device.type,
        "compiled": args.compile == "on",
        "fp32_attention": model.device.type == "cpu",  # an upper bound: all documents may be short
    }
    without, with_it = (memory_needed(model.config, tokens, again, **settings) for again in (False, True))
    loaded = without["state"] // 4  # the weights, already in memory
    free = free_memory(model.device)
    room = loaded + (free * 0.9 if free else math.inf)
    short = torch.tensor([float(sum(need.values()) > room) for need in (without, with_it)], device=model.device)
    on, too_large = (sum_over_ranks(short) > 0).tolist()
    if free:
        spend_spare_memory(model, int(room - sum((with_it if on else without).values())))
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in without.items() if size >= GIB / 200)  # not 0.00
    takes = f"{sum(without.values()) / GIB:.2f} GiB ({parts})"
    spent = spent_memory(model, tokens) if model.spare_bytes > 0 else 0
    takes += f" and {spent / GIB:.2f} to save time" if spent >= GIB / 200 else ""
    has = f"{(loaded + free) / GIB:.2f} are free" if free else "free memory not known"
    choice = f"on, which takes {sum(with_it.values()) / GIB:.2f}" if on else "off"
    print0(f"memory: a micro-batch of {tokens:,} tokens takes {takes}, {has}: activation checkpointing {choice}")
    if too_large:
        print0("warning: still too large; lower --micro-tokens" + ", or --shard over several ranks" * (not args.shard))
    return on


def spend_spare_memory(model: Qwen2, spare_bytes: int) -> None:
    """Uses memory that a step leaves free to save time: weights cast once per step, then the head's logits kept."""
    model.casts = cast_copies(model, spare_bytes)
    model.spare_bytes = spare_bytes - sum(copy.nbytes for _, copy in model.casts)


def spent_memory(model: Qwen2, tokens: int) -> int:
    """Bytes of the cast weights, and of the logits that a micro-batch of `tokens` supervised tokens keeps."""
    itemsize = 4 if model.device.type == "cuda" else model.compute_dtype.itemsize  # as in core.head.token_logps
    logits = tokens * model.config.vocab_size * itemsize
    return sum(copy.nbytes for _, copy in model.casts) + min(model.spare_bytes, logits)


def recompute(block: torch.nn.Module) -> None:
    """Checkpoints the block: it keeps only its input and recomputes the rest in the backward, with the same RNG."""
    block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
