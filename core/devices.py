"""The values of --device and --dtype."""

import argparse

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the values of --dtype
DEVICE, DTYPE = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")  # defaults


def choose_device(args: argparse.Namespace) -> None:
    """Sets args.device and args.dtype to the defaults where they were not given."""
    args.device, args.dtype = args.device or DEVICE, args.dtype or DTYPE
