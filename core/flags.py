"""Command-line flags: a parser that reports errors in one line, and argparse types that check values."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

import torch

from core.checkpoint import check_out
from core.distributed import is_main
from core.files import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the values of --dtype
DEVICE, DTYPE = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")  # defaults


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, unless it is None, False, an empty list, or described by the text itself."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing or "(default" in (action.help or "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a wrong flag as InputError, in one line and without the usage text."""

    def __init__(self, **settings: object):
        super().__init__(**{"formatter_class": Help, **settings})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def at_least(low: int, high: float = math.inf) -> Callable[[str], int]:
    """An argparse type: an integer from `low` to `high`."""

    def integer(text):
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{value} is more than {high}")
        return value

    return integer


def number(low: float = -math.inf, above: float = -math.inf, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number with low <= number, above < number and number < below."""

    def number(text):
        value = float(text)
        for fault, words in (
            (not math.isfinite(value), "not finite"),
            (value < low, f"less than {low:g}"),
            (value <= above, f"not above {above:g}"),
            (value >= below, f"not below {below:g}"),
        ):
            if fault:
                raise argparse.ArgumentTypeError(f"{text} is {words}")
        return value

    return number


def checkpoint_out(text: str) -> str:
    """An argparse type: a path where a checkpoint can be written. Drops a trailing slash: OUT.run is beside OUT."""
    out = text.rstrip("/") or "/"
    if is_main():  # only rank 0 writes; other nodes may not share its disk
        check_out(out)
    return out


def torch_device(text: str) -> str:
    """An argparse type: the name of a torch device that this machine has."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no torch device; give cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text}: no such GPU, torch sees {torch.cuda.device_count()} here; cpu always works"
        )
    return text
