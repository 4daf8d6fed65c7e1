"""Command-line flags: a parser that reports errors in one line, and argparse types that check values.

At the end are the flags of generate.py. This module does not import torch, so that a script can parse its arguments
before torch is loaded.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from core.files import InputError, is_main
from core.outputs import check_checkpoint_path, check_file


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, unless it is None, False, an empty list, or described by the text itself."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing or "(default" in (action.help or "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a wrong flag as InputError, in one line and without the usage text.

    --help shows only the first paragraph of the description, which may be a module's docstring.
    """

    def __init__(self, **settings: object):
        super().__init__(**{"formatter_class": Help, "prog": typed_command(), **settings})
        self.register("type", None, some_text)  # of flags without a type

    def format_help(self) -> str:
        self.description = (self.description or "").split("\n\n")[0]
        return super().format_help()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: object = None) -> tuple:
        for word in sys.argv[1:] if args is None else args:
            if re.fullmatch("--[^=]+=--", word):  # argparse takes it for a flag without a value
                self.error(f"argument {word[:-3]}: -- is no value; give a file of this name as ./--")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def some_text(text: str) -> str:
    """An argparse type: any text but the empty one, which is often the value of an unset shell variable.

    Flags whose value may be empty have type=str.
    """
    if not text:
        raise argparse.ArgumentTypeError("the value is empty; give one, or leave out the flag")
    return text


def typed_command() -> str | None:
    """The program's name for --help: "python -m tools.page", or None for argparse's own, the name of the script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # only `python -m` sets it
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


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


def number(
    low: float = -math.inf, high: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite number with low <= number <= high and above < number < below."""

    def number(text):
        value = float(text)
        for fault, words in (
            (not math.isfinite(value), "not finite"),
            (value < low, f"less than {low:g}"),
            (value > high, f"more than {high:g}"),
            (value <= above, f"not above {above:g}"),
            (value >= below, f"not below {below:g}"),
        ):
            if fault:
                raise argparse.ArgumentTypeError(f"{text} is {words}")
        return value

    return number


def out_path(text: str) -> str:
    """An argparse type: the name of an output, without a trailing slash: OUT.run is beside OUT.

    A name with .. becomes absolute, because missing/../name leads nowhere before the folder `missing` is made.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    if text.startswith("-"):  # the printed next commands could not be pasted
        raise argparse.ArgumentTypeError(f"{text} begins like a flag; write ./{text}")
    text = text.rstrip("/") or "/"
    return os.path.realpath(text) if os.pardir in text.split(os.sep)[:-1] else text


def checkpoint_out(text: str) -> str:
    """An argparse type: out_path() where a checkpoint can be written."""
    out = out_path(text)
    if is_main():  # only rank 0 writes; other nodes may not share its disk
        check_out(out)
    return out


def check_out(out: str) -> None:
    """InputError unless a checkpoint can be written at `out`, so that the work before it is not lost."""
    check_checkpoint_path(out)
    path = os.path.realpath(out)
    if out.endswith(".pt") and os.path.lexists(path) and (not os.path.isfile(path) or os.path.getsize(path)):
        from core.checkpoint import Checkpoint  # loads torch, which most command lines need not wait for

        try:
            Checkpoint(path)
        except InputError:
            raise InputError(f"{out}: exists and is no checkpoint of this project; give another --out") from None


def file_out(mark: str) -> Callable[[str], str]:
    """An argparse type: out_path() of a file that is absent, empty, or ours (it contains the text `mark`)."""

    def path(text):
        out = out_path(text)
        check_file(out, mark)
        return out

    return path


def torch_device(text: str) -> str:
    """An argparse type: the name of a torch device that this machine has."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; give cpu, cuda or cuda:1")
    if text != "cpu":
        import torch  # only here: the default needs no check

        index, found = int(text.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= found:
            raise argparse.ArgumentTypeError(f"{text}: no such GPU, torch sees {found} here; cpu always works")
    return text


FlagGroup = argparse._ActionsContainer  # a parser, or a group of its flags


def add_device_flags(p: FlagGroup, dtype: str) -> None:
    """Adds --dtype and --device. core.devices.choose_device sets their defaults. dtype: the help text of --dtype."""
    p.add_argument("--dtype", choices=["fp32", "bf16"], help=f"{dtype} (default: bf16 on a GPU, else fp32)")
    p.add_argument("--device", type=torch_device, help="torch device (default: cuda if there is a GPU, else cpu)")


def add_generation_flags(p: FlagGroup, max_new_tokens: int) -> None:
    """Adds --max-new-tokens, with this default, --batch-size, --dtype and --device."""
    length = "maximum length of a reply, in tokens"
    p.add_argument("--max-new-tokens", type=at_least(1), default=max_new_tokens, help=length)
    rows = "prompts in flight; in fp32 the replies do not depend on it"
    p.add_argument("--batch-size", type=at_least(1), default=32, help=rows)
    add_device_flags(p, "dtype of weights and computation")


def parse_generate_args() -> argparse.Namespace:
    """Parses generate.py's arguments."""
    p = Parser(description="Batched generation from a checkpoint, or a chat in the terminal.")
    p.add_argument("--ckpt", required=True, help="hub id, folder or .pt file")
    p.add_argument(
        "--prompt", nargs="+", type=str, help="one or more user messages; without it, a chat in the terminal"
    )
    p.add_argument("--system", type=str, help="system prompt; without it, the template's default")
    add = p.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=at_least(1), default=512, help="maximum length of a reply, in tokens")
    add("--temperature", type=number(0), default=0.0, help="0 takes the likeliest token")
    add("--top-k", type=at_least(0), default=0, help="sample from the k likeliest tokens; 0: from all")
    top_p = "sample from the likeliest tokens that together reach this probability"
    add("--top-p", type=number(above=0), default=1.0, help=top_p)
    penalty = "above 1, tokens that occurred before become less likely; generation_config.json does not set it"
    add("--repetition-penalty", type=number(0.01, below=100), default=1.0, help=penalty)
    add("--seed", type=int, default=0, help="seed of the sampling")
    cache = "size of the KV cache in GiB; prompts that do not fit wait"
    add("--cache-gb", type=number(above=0), default=4.0, help=cache)
    add_device_flags(p.add_argument_group("machine"), "dtype of weights and computation")
    return p.parse_args()
