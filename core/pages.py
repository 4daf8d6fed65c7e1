"""Memory: pages of mapped files, given back as they are read, and how much this machine has free."""

import contextlib
import ctypes
import mmap
import os
import sys

import torch


def mapped(tensors):
    """Those of the tensors that lie in a mapped file (known on Linux only). Their memory may be given back: the file still
    has what it held, as nobody writes into a checkpoint's tensors. Any other memory would come back as zeros. Small ones
    are left out: to look them up would take longer than to read them."""
    tensors, files = [t for t in tensors if t.is_contiguous() and t.numel() >= WINDOW // 16], []
    highest = max((t.data_ptr() for t in tensors), default=0)
    with contextlib.suppress(OSError), open("/proc/self/maps" if tensors else os.devnull) as f:
        for line in f:  # in the order of addresses
            span, _, _, _, inode = line.split(maxsplit=5)[:5]
            begin, end = (int(address, 16) for address in span.split("-"))
            if inode != "0":
                files.append((begin, end))
            if end > highest:
                break
    return [t for t in tensors if any(a <= t.data_ptr() and t.data_ptr() + t.nbytes <= b for a, b in files)]


WINDOW = 2**22  # elements of a mapped tensor that stay in memory while it is read


def page_chunks(n, held, size):
    """Yields the slices of n elements, `size` at a time. held: flat tensors of n elements as mapped() gives them: what
    lies behind is given back to the system, so that memory does not grow with what is read; a later use reads it again."""
    behind = 0
    for start in range(0, n, size):
        stop = min(start + size, n)
        yield slice(start, stop)
        if stop == n or stop - behind >= WINDOW:
            for t in held:
                drop_pages(t[behind:stop])
            behind = stop


def release(t):
    """Takes a tensor of a mapped file out of this process's memory; the next use reads it again. Leaves others alone."""
    for found in mapped([t]):
        drop_pages(found)


def drop_pages(t):
    """release() of one of mapped()'s tensors or a part of it, which is not checked again."""
    begin = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: others may need the rest
    size = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def start_writing(f):
    """Has the system write to the disk what it holds of an open file, without waiting: the next tensors are made meanwhile,
    and the fsync at the end finds little left to do. Linux only."""
    if sys.platform == "linux":
        f.flush()
        whole_file, write = ctypes.c_int64(0), 2  # SYNC_FILE_RANGE_WRITE
        ctypes.CDLL(None).sync_file_range(f.fileno(), whole_file, whole_file, write)


GIB = 2**30


def available_memory():
    """Bytes that a process may take without swapping, within the machine and its container; 0 where the system (any but Linux)
    does not say."""
    try:
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no container, or "max": no limit
        most, used = (int(open(f"/sys/fs/cgroup/memory.{name}").read()) for name in ("max", "current"))
        with open(
            "/sys/fs/cgroup/memory.stat"
        ) as f:  # pages of files that nobody reads now count as used and make room when asked
            used -= next(int(line.split()[1]) for line in f if line.startswith("inactive_file "))
        free = min(free, max(1, most - used))  # 1: known to be nothing
    return free


def free_memory(device):
    """Bytes that this process may still take on the device; 0 where nothing says how many."""
    kind = torch.device(device).type
    if kind == "cuda":  # what torch holds back from former tensors is free too
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if kind == "cpu" else 0
