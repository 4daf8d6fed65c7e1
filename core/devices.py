"""The values of --device and --dtype, and copies to a device."""

import argparse

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the values of --dtype


def default_dtype(device: str) -> str:
    """fp32 on a CPU, bf16 on a GPU."""
    return "fp32" if device == "cpu" else "bf16"


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # default
DTYPE = default_dtype(DEVICE)


def choose_device(args: argparse.Namespace) -> None:
    """Sets args.device and args.dtype to the defaults where they were not given."""
    args.device = args.device or DEVICE
    args.dtype = args.dtype or default_dtype(args.device)


def to_device(x: Tensor | list, device: torch.device | str) -> Tensor:
    """Copies a list or tensor to the device without waiting for the GPU.

    A copy from pinned memory is asynchronous, so the host packs the next micro-batch while the GPU computes this one.
    torch.tensor(x, device=...) and indexing with a list would wait for the GPU.
    """
    x = torch.as_tensor(x)
    if x.is_cpu and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
