"""Ranks, stop signals, micro-batches, gradient sums over ranks, and sharded weights (FSDP2).

Every function also works in a single process without torchrun.
"""

import datetime
import functools
import heapq
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.files import InputError, is_main

# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and the device that it computes on."""

    rank: int = 0
    world: int = 1  # number of ranks
    device: str = "cpu"


ONE_RANK = Ranks()


def own_device(device: str) -> str:
    """The GPU of this rank if device is "cuda"; any other device unchanged."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def join_ranks(device: str = "cpu", hours: float = 1, nccl: bool = False) -> Ranks:
    """Joins the process group if torchrun started this process.

    device: as given on the command line; "cuda" becomes this rank's own GPU. hours: how long a rank waits for the
    others before it fails. nccl: GPUs communicate through NCCL. Without it, and on CPUs, ranks use gloo.
    """
    gpu = torch.device(own_device(device)) if device.startswith("cuda") else None
    if device == "cuda":
        torch.cuda.set_device(gpu)
    if not dist.is_initialized():
        check_environment()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        timeout, direct = datetime.timedelta(hours=hours), nccl and gpu is not None
        dist.init_process_group("nccl" if direct else "gloo", timeout=timeout, device_id=gpu if direct else None)
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), own_device(device))


def check_environment() -> None:
    """InputError if only some of torchrun's variables are set: this process would wait for others, or write nothing."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and ("WORLD_SIZE" in os.environ or os.environ.get("RANK", "0") != "0"):
        known = ", ".join(name for name in names if name in os.environ)
        raise InputError(f"the environment has {known} but no {missing[0]}; start with torchrun, or unset these")


def leave_group(at_once: bool = False) -> None:
    """Closes the process group after all ranks have arrived here. at_once: does not wait for the others.

    Without waiting, a rank may abort because a peer closed the group while it was still reading.
    """
    if dist.is_initialized():
        if not at_once:
            dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Stopping

STOP = {"training": False, "asked": 0}  # training: steps may be done; asked: the signal received, SIGTERM or SIGINT


class StopBeforeTraining(BaseException):
    """Raised by SIGTERM before the first step. Not an Exception, so that no `except Exception` catches it."""


def on_stop_signal(number: int, _frame: object) -> None:
    """Handles SIGTERM and Ctrl-C.

    During training, the loop finishes its micro-batch, drops the current step, saves the state after the previous step
    and exits, with code 0 after SIGTERM and 130 after Ctrl-C. A second Ctrl-C ends at once. Before training there is
    nothing to save, so the process ends at once; an interrupted reference pass still saves its cache.

    On SIGTERM torchrun signals its ranks, waits 30 s for them (--shutdown-timeout) and exits with code 1. If you need
    exit code 0, signal the ranks instead: pkill -TERM -P PID_OF_TORCHRUN.
    """
    STOP["asked"] = number
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if STOP["training"]:
        if number == signal.SIGINT and is_main():
            # not print, which is not reentrant
            os.write(2, b"\nstopping: the finished steps are saved; Ctrl-C again ends at once\n")
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(2, b"stopped before the first step\n")
        raise StopBeforeTraining


def stop_asked(device: torch.device | str) -> bool:
    """True if any rank received SIGTERM or Ctrl-C. A collective operation: all ranks must call it."""
    return sum_over_ranks(torch.tensor([float(STOP["asked"])], device=device)).item() > 0


def run_distributed(main: Callable[[], object]) -> Callable[[], None]:
    """Wraps main() for core.files.cli: SIGTERM and Ctrl-C stop it cleanly, and it exits if another rank has died."""

    def run():
        signal.signal(signal.SIGTERM, on_stop_signal)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # background jobs ignore it; keep that
            signal.signal(signal.SIGINT, on_stop_signal)
        try:
            main()
            if STOP["asked"] == signal.SIGINT:  # in `train_sft.py && train_kto.py`, the second must not start
                raise KeyboardInterrupt
        except StopBeforeTraining:
            pass
        except RuntimeError as e:
            if not dist.is_initialized() or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
                raise
            lost = f"another rank is gone ({str(e).strip().splitlines()[0]})"
            text = f"error: rank {dist.get_rank()}: {lost}; --resume continues from the last save"
            print(text, file=sys.stderr, flush=True)
            os._exit(1)  # an orderly exit would wait for the rank that is gone
        finally:
            if dist.is_initialized() and dist.get_backend() == "gloo":  # its threads may abort an exiting process
                dist.destroy_process_group()

    return run


def single_process(main: Callable[[], object]) -> Callable[[], None]:
    """Wraps main() for core.files.cli: InputError under torchrun, because every rank would do the same work."""

    def run():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("torchrun: this command runs in one process; start it with python")
        main()

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The work of a step


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sums the tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def from_rank_0(x: Tensor) -> Tensor:
    """Overwrites the tensor with rank 0's, in place."""
    if dist.is_initialized():
        dist.broadcast(x, 0)
    return x


@torch.no_grad()
def broadcast_replicas(model: nn.Module) -> None:
    """Copies rank 0's parameters and buffers to every rank, so that all replicas start equal.

    Sharded tensors are skipped, because each rank holds a different part.
    """
    for t in (*model.parameters(), *model.buffers()):
        if not hasattr(t, "full_tensor"):
            from_rank_0(t.data)


def split_by_tokens(lengths: list[int], micro_tokens: int, world: int) -> list[list[int]]:
    """Splits a step's examples into micro-batches of nearly equal size. -> lists of indices, the largest first.

    A micro-batch holds at most micro_tokens tokens; a longer example is a micro-batch by itself. There are as few
    micro-batches as possible, and equally many per rank. Some are empty if there are fewer examples than ranks.
    Greedy: examples are taken from long to short, each into the micro-batch with the fewest tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable sort: the split depends only on the lengths
    rounds = max(1, min(math.ceil(sum(lengths) / micro_tokens / world), math.ceil(len(lengths) / world)))
    while True:
        bins = [(0, b, []) for b in range(rounds * world)]  # (tokens, number, indices), a heap
        for i in order:
            tokens, b, indices = bins[0]
            heapq.heapreplace(bins, (tokens + lengths[i], b, [*indices, i]))
        if all(tokens <= micro_tokens or len(indices) == 1 for tokens, _, indices in bins):
            return [indices for _, _, indices in sorted(bins, key=lambda b: (-b[0], b[1]))]
        rounds = min(rounds + 1 + rounds // 32, len(lengths))  # one example each always fits


def rank_micro_batches(
    lengths: list[int], micro_tokens: int, ranks: Ranks, equal_counts: bool = False
) -> list[list[int]]:
    """This rank's micro-batches of a step. equal_counts: keep empty ones, so that every rank has the same number."""
    own = split_by_tokens(lengths, micro_tokens, ranks.world)[ranks.rank :: ranks.world]
    return [micro for micro in own if micro or equal_counts]


def overlapped_reduction(model: nn.Module, world: int, size: int = 2**24) -> tuple[Callable, Callable]:
    """Sums the gradients of replicas over the ranks while the step's last backward is still running, as DDP does.

    Unlike DDP, ranks may run different numbers of backwards, or none, and a rank may stop between two of them.

    -> (start_sync, wait_sync). start_sync(n): this rank will run n backwards in the step. wait_sync(): waits for the
    sums. Each gradient is a view into one of several flat buffers of about `size` elements. The buffers fill from the
    last layer to the first. A full buffer is sent at once, in the same order on all ranks.

    Sharded models sum inside each backward instead. Keeping whole gradients until the last backward would take the
    memory that sharding saves.
    """
    if world == 1 or is_sharded(model):
        return lambda n: None, lambda: None
    buckets, room = [], 0
    for p in reversed([p for p in model.parameters() if p.requires_grad]):
        if room <= 0:
            buckets.append([])
            room = size
        buckets[-1].append(p)
        room -= p.numel()
    flat = [torch.zeros(sum(p.numel() for p in bucket), device=model.device) for bucket in buckets]
    waiting, sent = [0] * len(buckets), []  # gradients missing in each bucket; running reductions

    def send(all_of_them=False):
        while len(sent) < len(flat) and (all_of_them or waiting[len(sent)] == 0):
            sent.append(dist.all_reduce(flat[len(sent)], async_op=True))

    def count_down(b, _):
        waiting[b] -= 1
        send()

    for b, bucket in enumerate(buckets):
        for p, gradient in zip(bucket, flat[b].split([p.numel() for p in bucket])):
            p.grad = gradient.view_as(p)
            p.register_post_accumulate_grad_hook(functools.partial(count_down, b))

    def start_sync(n):
        waiting[:] = [n * len(bucket) for bucket in buckets]
        sent.clear()

    def wait_sync():
        send(all_of_them=True)
        for work in sent:
            work.wait()

    return start_sync, wait_sync


# ---------------------------------------------------------------------------------------------------------------------
# Sharded weights


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "unshard")  # a method of FSDP2's modules


def shard(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Splits parameters, gradients and optimizer state over the ranks with FSDP2, block by block.

    Weights are gathered only while they are used: the blocks' in the compute dtype, embedding and head in fp32.
    If embedding and head are one matrix, its two gradients are added in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for module in (*model.model["layers"], model):
        policy = MixedPrecisionPolicy(None if module is model else dtype, torch.float32)
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # sum over the ranks, not mean
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    register_fsdp_forward_method(model, "kl_to_policy")  # gathers the weights as forward does


@torch.no_grad()
def load_into(p: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a parameter, buffer or moment. If `p` is sharded, copies this rank's part."""
    if hasattr(p, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole.to(p.device, p.dtype), p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(whole)


def gathered(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, whole tensor), copied to the CPU on rank 0. If any tensor is sharded, all ranks must iterate."""
    for name, t in tensors.items():
        whole = (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()
        yield name, whole.cpu() if is_main() else whole
