"""Several processes as one: torchrun's ranks, signals, the cut of a step, gradients over ranks, sharded weights (FSDP2).

Plain functions, each of which is right for a single process too.
"""

import datetime
import functools
import heapq
import math
import os
import signal
import sys

import torch
import torch.distributed as dist

# ---------------------------------------------------------------------------------------------------------------------
# Starting and ending

STOP = {"training": False, "asked": False}  # asked: whether SIGTERM came


def own_device(device):
    """A rank's own GPU for "cuda"; any other device as it is."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def join_group(hours, gpu=None):
    """Under torchrun joins the process group: nccl for the rank's gpu, else gloo. -> (rank, world).

    hours: how long a rank waits for the others before it gives up."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=hours), device_id=gpu)
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def on_sigterm(*_):
    """While training, the step or evaluation at hand is abandoned after its micro-batch and the steps before it are saved; a
    save is finished first. Before training there is nothing to save (the reference pass saves its own on the way out): ends at once.

    The exit code is 0. torchrun, told to end, passes SIGTERM on to its ranks, waits 30 s for them (--shutdown-timeout) and
    exits with 1 whatever they say; where that matters, signal its ranks (pkill -TERM -P PID_OF_TORCHRUN): then it exits with 0."""
    STOP["asked"] = True
    if not STOP["training"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(2, b"stopped before the first step\n")  # print may be what the signal interrupted
        sys.exit(0)


def stop_asked(device):
    """Whether SIGTERM came to any rank. All ranks must ask."""
    return sum_over_ranks(torch.tensor([float(STOP["asked"])], device=device)).item() > 0


def leave_group(at_once=False):
    """Closes the process group. A rank that exits with its group open may abort, and so may one whose peer closes while it is
    still reading, so all wait for one another first. at_once: this rank does not wait."""
    if dist.is_initialized():
        if not at_once:
            dist.barrier()
        dist.destroy_process_group()


def run_distributed(main):
    """main() for cli(), as a process that heeds SIGTERM and, where another rank is gone, says so and ends too."""

    def run():
        signal.signal(signal.SIGTERM, on_sigterm)
        try:
            main()
        except RuntimeError as e:
            if not dist.is_initialized() or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
                raise
            reason = str(e).strip().splitlines()[0]
            after = "--resume goes on from the last save"
            print(
                f"error: rank {dist.get_rank()}: another rank is gone ({reason}); {after}", file=sys.stderr, flush=True
            )
            os._exit(1)  # an orderly end would wait for the one that is gone
        finally:
            if (
                dist.is_initialized() and dist.get_backend() == "gloo"
            ):  # whose threads may abort a process that ends with them
                dist.destroy_process_group()

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The work of a step


def sum_over_ranks(x):
    """The tensor summed over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def from_rank_0(x):
    """Rank 0's tensor on all ranks, in place."""
    if dist.is_initialized():
        dist.broadcast(x, 0)
    return x


def split_by_tokens(lengths, micro_tokens, world):
    """A step's examples in micro-batches of nearly equal work: lists of indices, the largest first, as many for each rank.

    The fewest that hold at most micro_tokens each (a longer example stands alone): longest first, each into the
    emptiest. Where the examples are fewer than the ranks, some are empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: the cut depends on the lengths alone
    rounds = max(1, min(math.ceil(sum(lengths) / micro_tokens / world), math.ceil(len(lengths) / world)))
    while True:
        bins = [(0, b, []) for b in range(rounds * world)]  # (tokens, number, indices), a heap
        for i in order:
            tokens, b, indices = bins[0]
            heapq.heapreplace(bins, (tokens + lengths[i], b, [*indices, i]))
        if all(tokens <= micro_tokens or len(indices) == 1 for tokens, _, indices in bins):
            return [indices for _, _, indices in sorted(bins, key=lambda b: (-b[0], b[1]))]
        rounds = min(rounds + 1 + rounds // 32, len(lengths))  # the last is enough: each example by itself


def rank_micro_batches(lengths, micro_tokens, rank, world, equal_counts=False):
    """This rank's micro-batches of a step. With equal_counts all ranks have equally many, and so some may be empty."""
    return [micro for micro in split_by_tokens(lengths, micro_tokens, world)[rank::world] if micro or equal_counts]


def overlapped_reduction(model, world, size=2**24):
    """Sums the gradients of replicated models over the ranks, while the step's last backward is still running.

    -> (expect, finish). expect(n): this rank's part of the step has n backwards. finish(): waits for the sums.
    Every gradient becomes a view into one of several flat buffers of about `size` elements, which fill from the last
    layer to the first; a full one is sent off at once, in the same order on all ranks. A sharded model sums in each
    backward instead: whole gradients, kept for the last one, would take the memory that sharding is there to save.
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
    waiting, sent = [0] * len(buckets), []  # gradients that a bucket waits for; the sums on their way

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

    def expect(n):
        waiting[:] = [n * len(bucket) for bucket in buckets]
        sent.clear()

    def finish():
        send(all_of_them=True)
        for work in sent:
            work.wait()

    return expect, finish


# ---------------------------------------------------------------------------------------------------------------------
# Sharded weights


def is_sharded(model):
    return hasattr(model, "unshard")  # a method of FSDP2's modules


def shard(model, device, dtype):
    """Spreads parameters, and with them gradients and optimizer state, over the ranks: FSDP2, per block and the rest.

    Weights are whole only while they compute. Those of the blocks travel in the dtype they compute in; embedding and
    head stay fp32, so that their gradients, where the two are one matrix, add up in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for module in (*model.model["layers"], model):
        policy = MixedPrecisionPolicy(None if module is model else dtype, torch.float32)
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the sum over the ranks, not the mean
        module.set_force_sum_reduction_for_comms(True)  # as a plain sum: gloo has no other


@torch.no_grad()
def load_into(p, whole):
    """Copies a whole tensor into a parameter or moment, or this rank's part of it if that is sharded."""
    if hasattr(p, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole.to(p.device, p.dtype), p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(whole)


def gathered(tensors):
    """{name: tensor} -> yields (name, the whole tensor, on rank 0 on the CPU). If they are sharded, all ranks must take them
    all."""
    for name, t in tensors.items():
        whole = (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()
        yield name, whole if dist.is_initialized() and dist.get_rank() else whole.cpu()
