"""Keeps memory low while large files are read and written, and measures how much memory is free.

Two functions of the C library are called through ctypes, because Python does not offer them. madvise drops the pages of
a mapped file that were read, so that reading a checkpoint does not fill the memory. sync_file_range starts writing to
the disk while the next tensor is computed, so that the fsync at the end is short.
"""

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import torch
from torch import Tensor

GIB = 2**30
WINDOW = 2**22  # elements of a mapped tensor that are in memory at once while it is read


def mapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that are in a memory-mapped file, according to /proc/self/maps (Linux), without small ones.

    Only pages of mapped files may be dropped, because they can be read again; other memory would come back as zeros."""
    tensors, files = [t for t in tensors if t.is_contiguous() and t.numel() >= WINDOW // 16], []
    highest = max((t.data_ptr() for t in tensors), default=0)
    with contextlib.suppress(OSError), open("/proc/self/maps" if tensors else os.devnull) as f:
        for line in f:  # sorted by address
            span, _, _, _, inode = line.split(maxsplit=5)[:5]
            begin, end = (int(address, 16) for address in span.split("-"))
            if inode != "0":
                files.append((begin, end))
            if end > highest:
                break
    return [t for t in tensors if any(begin <= t.data_ptr() and t.data_ptr() + t.nbytes <= end for begin, end in files)]


def page_chunks(n: int, held: list[Tensor], size: int) -> Iterator[slice]:
    """Yields slices of `size` elements that cover n elements, and drops the pages that were read before.

    held: flat tensors of n elements from mapped(). Their elements before the current slice are dropped from memory."""
    behind = 0
    for start in range(0, n, size):
        stop = min(start + size, n)
        yield slice(start, stop)
        if stop == n or stop - behind >= WINDOW:
            for t in held:
                drop_pages(t[behind:stop])
            behind = stop


def release(t: Tensor) -> None:
    """Drops the pages of a mapped tensor from memory; the next use reads them again. Other tensors are left alone."""
    for found in mapped([t]):
        drop_pages(found)


def drop_pages(t: Tensor) -> None:
    """Drops the whole pages inside a tensor of mapped(), or a part of one. The caller checks that it is mapped."""
    begin = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # round up: the page may hold the end of another tensor
    size = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def start_writing(f: BinaryIO) -> None:
    """Starts writing an open file's data to the disk without waiting (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        f.flush()
        whole_file, write = ctypes.c_int64(0), 2  # SYNC_FILE_RANGE_WRITE
        ctypes.CDLL(None).sync_file_range(f.fileno(), whole_file, whole_file, write)


def available_memory() -> int:
    """Bytes that a process can take without swapping, limited by machine and container; 0 if unknown (not Linux)."""
    try:
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    with contextlib.suppress(OSError, ValueError, StopIteration):  # not in a container, or no limit ("max")
        most, used = (int(open(f"/sys/fs/cgroup/memory.{name}").read()) for name in ("max", "current"))
        with open("/sys/fs/cgroup/memory.stat") as f:  # inactive pages of files count as used but can be reclaimed
            used -= next(int(line.split()[1]) for line in f if line.startswith("inactive_file "))
        free = min(free, max(1, most - used))  # 1, not 0: it is known that nothing is free
    return free


def free_memory(device: torch.device | str) -> int:
    """Bytes that this process can still take on the device; 0 if unknown."""
    kind = torch.device(device).type
    if kind == "cuda":  # memory that torch keeps for reuse is free too
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if kind == "cpu" else 0
