"""What a training script does before its first step: flags, ranks, model, batches, optimizer."""

import functools
import itertools
import math
import os
import random

import torch
import torch.distributed as dist
import torch.utils.checkpoint

from core.checkpoint import Checkpoint
from core.distributed import STOP, is_sharded, join_group, load_into, own_device, shard, split_by_tokens, sum_over_ranks
from core.files import InputError, same_path
from core.flags import DEVICE, DTYPE, DTYPES, at_least, checkpoint_out, number, torch_device
from core.pages import GIB, free_memory
from core.tokenizer import Tokenizer
from model import Qwen2, check_finite
from training.memory import memory_needed


def setup_ranks(a):
    """What a training script begins with. -> (rank, world, device)."""
    # micro-batches differ in length, and what is free of one must serve the next
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = own_device(a.device)
    gpu = torch.device(device) if device.startswith("cuda") else None
    if a.device == "cuda":
        torch.cuda.set_device(gpu)
    rank, world = join_group(
        hours=1, gpu=gpu
    )  # nccl's own ten minutes may be too short for rank 0's save of a large model
    if a.shard and not dist.is_initialized():
        raise InputError("--shard: splits the model over the ranks of a torchrun; start the script with torchrun")
    STOP.update(training=False, asked=False)
    return rank, world, device


# ---------------------------------------------------------------------------------------------------------------------
# Batches of indices, drawn before training starts


def plan_steps(n, batch_size, epochs, max_steps, smallest=1, order=None):
    """The whole run's batches: a list of steps, each a list of indices into the n examples.

    order(epoch, sizes) gives the epoch's permutation, where sizes are the batch sizes it will be cut into. The last
    batch of an epoch may be short; a remainder under `smallest` joins the batch before. max_steps, where given, decides
    over epochs.
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


def shuffled_order(n, seed):
    """plan()'s order for a shuffled epoch: another permutation each epoch, the same for the same seed."""

    def order(epoch, sizes):
        indices = list(range(n))
        random.Random(f"{seed} {epoch}").shuffle(indices)
        return indices

    return order


def schedule_advice(a, steps):
    """A list of warnings about the learning rate's schedule."""
    return [f"all {len(steps)} steps are warmup; lower --warmup or --batch-size"] if len(steps) <= a.warmup else []


def make_optimizer(model, a):
    """AdamW (arXiv 1711.05101). Matrices decay, biases and norms do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": a.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=a.lr, betas=(a.beta1, a.beta2), eps=a.eps, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def add_training_flags(p, epochs, batch_size, lr):
    """The flags that both training scripts have; the three arguments are their own defaults."""
    # checkpoints
    p.add_argument("--ckpt", required=True, help="model to start from: hub id, directory or .pt file")
    p.add_argument(
        "--out",
        type=checkpoint_out,
        required=True,
        help="checkpoint to write: a directory, or a .pt file by its suffix",
    )
    # data
    p.add_argument("--data", nargs="+", required=True, help="JSON Lines files to train on")
    p.add_argument("--eval-data", nargs="+", help="held-out JSON Lines files")
    p.add_argument("--max-len", type=at_least(2), default=1024, help="tokens; longer examples lose their end")
    p.add_argument("--no-shuffle", action="store_true", help="keep the order of the files in every epoch")
    p.add_argument("--seed", type=int, default=0, help="seed of the order of the data")
    # optimisation
    p.add_argument("--epochs", type=at_least(1), default=epochs, help="passes over the data")
    p.add_argument("--max-steps", type=at_least(1), help="optimizer steps, instead of --epochs")
    p.add_argument(
        "--batch-size", type=at_least(1), default=batch_size, help="examples per optimizer step, over all ranks"
    )
    p.add_argument("--lr", type=number(0), default=lr, help="peak learning rate")
    p.add_argument(
        "--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="of the learning rate"
    )
    p.add_argument("--warmup", type=at_least(0), default=10, help="steps over which the learning rate rises from 0")
    p.add_argument("--weight-decay", type=number(0), default=0.0, help="AdamW's, on matrices")
    p.add_argument("--beta1", type=number(0, below=1), default=0.9, help="AdamW's decay of the first moment")
    p.add_argument("--beta2", type=number(0, below=1), default=0.999, help="AdamW's decay of the second moment")
    p.add_argument("--eps", type=number(0), default=1e-8, help="AdamW's epsilon")
    p.add_argument("--clip", type=number(0), default=1.0, help="largest norm of the gradient; 0 does not clip")
    p.add_argument(
        "--max-skips",
        type=at_least(1),
        default=3,
        help="end after so many steps in a row without finite loss and gradient",
    )
    # machine
    micro_tokens = 16384 if DEVICE == "cuda" else 1024
    p.add_argument("--micro-tokens", type=at_least(1), default=micro_tokens, help="tokens of one forward on one device")
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="to compute in; weights stay fp32")
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")
    p.add_argument(
        "--compile", action="store_true", help="torch.compile the blocks: pays after some hundred micro-batches"
    )
    p.add_argument(
        "--shard", action="store_true", help="spread weights, gradients and moments over the ranks of a torchrun"
    )
    p.add_argument("--activation-checkpointing", nargs="?", choices=["auto", "on", "off"], default="auto", const="on",
                   help="compute blocks again in the backward, to save memory; auto: if a step would not fit otherwise")  # fmt: skip
    # saving
    p.add_argument(
        "--save-every", type=at_least(0), default=100, help="steps between saves into OUT.run/; 0 saves at the end only"
    )
    p.add_argument(
        "--keep", type=at_least(1), default=2, help="newest saves to keep; with --eval-every the best is kept too"
    )
    p.add_argument(
        "--eval-every", type=at_least(0), default=0, help="steps between evaluations; 0 evaluates at the end only"
    )
    p.add_argument("--resume", action="store_true", help="go on from the last save in OUT.run/")
    p.add_argument(
        "--tensorboard", action="store_true", help="write the log into OUT.run/ as TensorBoard's event files too"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_model(ckpt, a, device):
    """An open Checkpoint -> the model: fp32 weights that compute in --dtype, sharded as a.shard asks."""
    dtype = DTYPES[a.dtype]
    model = Qwen2.from_pretrained(ckpt, torch.float32, "meta" if a.shard else device)
    if a.shard:  # no rank ever holds the whole model
        shard(model, device, dtype)
        model.to_empty(device=device)
        for name, p in model.named_parameters():
            load_into(p, check_finite(ckpt, name, ckpt.tensor(name)))
    model.compute_dtype = dtype
    if a.compile:
        model.compile()
    return model


def open_checkpoint(source, a, device):
    """-> (model, tokenizer, checkpoint)."""
    for flag, path in (("ckpt", a.ckpt), ("ref", getattr(a, "ref", None))):
        if path and (same_path(a.out, path) or same_path(f"{a.out}.run", os.path.dirname(os.path.realpath(path)))):
            raise InputError(f"--out {a.out}: --{flag} starts from it or a save of it, as --resume would, and the run replaces them; "
                             "give another name")  # fmt: skip
    ckpt = Checkpoint(source)
    tokenizer, model = Tokenizer(ckpt), load_model(ckpt, a, device)
    if a.max_len > model.config.max_position_embeddings:
        a.max_len = model.config.max_position_embeddings
        if os.environ.get("RANK", "0") == "0":
            print(f"--max-len: the model's positions end at {a.max_len}; longer examples lose their end there")
    return model, tokenizer, ckpt


def checkpoint_activations(model, a, batches, rank, world):
    """Has the backward recompute the blocks if --activation-checkpointing says so; with auto, if a step would not fit otherwise.

    batches: yields the lengths of each step's examples. All ranks do as the one with the least memory must. A tenth of
    what is free is left for what the count does not see: the allocator's gaps, the kernels' own workspaces.
    """
    on = a.activation_checkpointing == "on"
    if a.activation_checkpointing == "auto":
        some = itertools.islice(batches, 1000)  # enough to meet the largest micro-batch, or nearly
        tokens = max(sum(lengths[i] for i in split_by_tokens(lengths, a.micro_tokens, world)[0]) for lengths in some)
        item, shards = DTYPES[a.dtype].itemsize, world if is_sharded(model) else 1
        settings = item, shards, model.device.type, a.compile
        without, with_it = (memory_needed(model.config, tokens, again, *settings) for again in (False, True))
        held = without["state"] // 4  # the weights, which are there already
        free = free_memory(model.device)
        room = held + (free * 0.9 if free else math.inf)
        short = [sum(need.values()) > room for need in (without, with_it)]
        on, too_large = (sum_over_ranks(torch.tensor(short, dtype=torch.float32, device=model.device)) > 0).tolist()
        if rank == 0:
            parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in without.items())
            there = f"{(held + free) / GIB:.2f} are free" if free else "how many are free is not known"
            print(f"memory: a step of {tokens:,} tokens at a time takes {sum(without.values()) / GIB:.2f} GiB ({parts}), {there}: "
                  f"activation checkpointing {'on, with it ' + format(sum(with_it.values()) / GIB, '.2f') if on else 'off'}")  # fmt: skip
            if too_large:
                print(
                    "warning: too much even so; lower --micro-tokens"
                    + ("" if a.shard else ", or --shard over several ranks")
                )
    for block in model.model["layers"] if on else []:
        recompute(block)


def recompute(block):
    """Makes the block keep only its input and recompute the rest in the backward. It draws no random numbers to restore."""
    block.forward = functools.partial(
        torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
    )
