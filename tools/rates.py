"""The machine's rates (a large matmul, plain copies), and synthetic 7B checkpoints to merge."""

import os
import shutil
import statistics
import tempfile
import time

import torch

from core.checkpoint import Checkpoint, tensor_bytes, write_checkpoint
from model import Qwen2
from tools.memory import SHAPES, raw_config

SEVEN_B = raw_config(*SHAPES["7B"])


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def matmul_rate(device: str, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of a large square matmul, the median over `seconds` of repeated runs."""
    n = 2048 if device == "cpu" else 8192
    x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rates, end = [], time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        x @ w
        synchronise(device)
        rates.append(2 * n**3 / (time.perf_counter() - start))
    if device != "cpu":
        del x, w
        torch.cuda.empty_cache()  # the sides are other processes and need the whole GPU
    return statistics.median(rates)


def device_copy_rate(device: str, seconds: float = 2.0) -> float:
    """Bytes/s, read plus written, of a copy within the device's memory, the median over `seconds` of repeated runs."""
    x = torch.ones(2**26 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    y, rates, end = torch.empty_like(x), [], time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        y.copy_(x)
        synchronise(device)
        rates.append(2 * x.numel() / (time.perf_counter() - start))
    return statistics.median(rates)


def merge_bytes(checkpoints: list[str], dtype: torch.dtype) -> tuple[list[str], int]:
    """The files that a merge reads, and the number of bytes that it writes in `dtype`."""
    files = [os.path.join(c, n) for c in checkpoints for n in sorted(os.listdir(c)) if n.endswith(".safetensors")]
    first = Checkpoint(checkpoints[0])
    return files, sum(tensor_bytes(first.shape(name), dtype) for name in first.names)


def copy_rate(files: list[str], to_write: int, scratch: str | None) -> float:
    """Bytes/s of a plain copy: read the files, write and sync as many bytes as the merge does."""
    read, left, block = 0, to_write, bytearray(2**24)
    start = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as f:
            while got := f.readinto(block):
                read += got
    with tempfile.TemporaryFile(dir=scratch, buffering=0) as f:
        while left > 0:
            left -= f.write(block[: min(left, len(block))])
        os.fsync(f.fileno())
    return (read + to_write) / (time.perf_counter() - start)


def synthetic_7b(folder: str) -> tuple[str, str, str]:
    """The paths of two models and a base of shape SEVEN_B in bf16, written into the folder if they are missing.

    The first model is noise. The second links to the same files. The base is zeros in sparse files.
    """
    first, second, base = (os.path.join(folder, name) for name in ("a", "b", "base"))
    if not os.path.isdir(first):
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in Qwen2(SEVEN_B).named_parameters()}
        noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16()
        tensors = ((n, noise.repeat(-(-s.numel() // len(noise)))[: s.numel()].view(s)) for n, s in shapes.items())
        specs = {n: (tuple(s), torch.bfloat16) for n, s in shapes.items()}
        write_checkpoint(first, SEVEN_B, {}, specs, tensors, 5 * 10**9)
    for name in os.listdir(first) if not os.path.isdir(base) else []:
        for other in (second, base):
            os.makedirs(other, exist_ok=True)
            if name.endswith(".json"):
                shutil.copy(os.path.join(first, name), other)
        if name.endswith(".safetensors"):
            os.symlink(os.path.abspath(os.path.join(first, name)), os.path.join(second, name))
            with open(os.path.join(first, name), "rb") as f, open(os.path.join(base, name), "wb") as zeros:
                header_size = f.read(8)
                zeros.write(header_size + f.read(int.from_bytes(header_size, "little")))
                zeros.truncate(os.path.getsize(f.name))
    return first, second, base
