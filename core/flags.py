"""What the command lines share: a parser whose faults are one line, and argparse types that check their values."""

import argparse
import math
import os

import torch

from core.files import InputError, check_out

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # what --dtype says
DEVICE, DTYPE = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")  # where nothing is said


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts end with the flag's default, where there is one."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's; but a wrong flag ends like any other bad input, in one line and without the usage before it."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": Help, **settings})

    def error(self, message):
        raise InputError(f"{message}; see --help")


def at_least(low, high=math.inf):
    """An argparse type: an integer from `low` to `high`."""

    def integer(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{value} is " + (f"less than {low}" if value < low else f"more than {high}")
            )
        return value

    return integer


def number(low=-math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a finite number, low <= number, above < number < below."""

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


def checkpoint_out(text):
    """An argparse type: where a checkpoint can be written. A slash at its end goes, for OUT.run stands beside OUT."""
    out = text.rstrip("/") or "/"
    if os.environ.get("RANK", "0") == "0":  # which is the rank that writes; another machine's disk may be another
        check_out(out)
    return out


def torch_device(text):
    """An argparse type: the name of a torch device that is there."""
    try:
        name = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no torch device; cpu, cuda and cuda:1 are") from None
    if name.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: runs on cpu and cuda only")
    if name.type == "cuda" and (name.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text}: no such GPU, torch sees {torch.cuda.device_count()} here; cpu is there"
        )
    return text
