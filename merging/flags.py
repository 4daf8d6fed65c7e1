"""The flags of merge.py and its search. Does not import torch, as in core/flags.py."""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence

from core.files import InputError
from core.flags import Parser, add_device_flags, at_least, checkpoint_out, file_out, number

# ---------------------------------------------------------------------------------------------------------------------
# Methods and their options

DARE, DELLA, BREADCRUMBS = ("dare_linear", "dare_ties"), ("della_linear", "della"), ("breadcrumbs", "breadcrumbs_ties")
RANDOM = DARE + DELLA  # masks are drawn at random
SPARSE = ("ties", *DARE, *BREADCRUMBS, *DELLA)  # keep a share of each delta's elements
ELECTS = ("ties", "dare_ties", "breadcrumbs_ties", "della")  # elect a sign for each element
NEEDS_BASE = ("task_arithmetic", *SPARSE, "expo")  # merge deltas
METHOD_NAMES = ("linear", "slerp", *NEEDS_BASE)  # the keys of METHODS in merge.py
# flag: (attribute of args, methods that use it, mergekit's default). fill_options replaces a default of None
OPTIONS = {
    "t":         ("t",         ("slerp",),                              None),
    "density":   ("density",   SPARSE,                                  [1.0]),
    "gamma":     ("gamma",     BREADCRUMBS,                             0.01),
    "epsilon":   ("epsilon",   DELLA,                                   0.15),
    "lambda":    ("scale",     NEEDS_BASE,                              1.0),
    "lines":     ("lines",     NEEDS_BASE,                              None),
    "trim":      ("trim",      ("ties",),                               "tensor"),
    "sign":      ("sign",      ELECTS,                                  "sum"),
    "rescale":   ("rescale",   SPARSE,                                  None),
    "normalize": ("normalize", ("linear", "task_arithmetic", *SPARSE),  None),
}  # fmt: skip


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for inputs and method, for merge.py and its search."""
    add = parser.add_argument_group("checkpoints").add_argument
    models = "checkpoints to merge: hub id, folder or .pt file, each with a weight (default: 1)"
    add("--models", required=True, nargs="+", metavar="C[:WEIGHT]", help=models)
    add("--base", metavar="C", help="checkpoint the models were trained from; optional for linear and slerp")
    resize = "cut or extend embeddings to the rows of --base, or of the first model; missing rows are copied from it"
    add("--resize", action="store_true", help=resize)
    add("--allow-tokenizer-mismatch", action="store_true", help="merge models whose tokenizers have different tokens")

    add = parser.add_argument_group("method").add_argument
    add("--method", required=True, choices=METHOD_NAMES, help="how to merge")
    weights_for = (
        "PATTERN W W ...: one weight per model, for the tensors whose names end in PATTERN, such as "
        "'layers.[0-7].*' or '*mlp*'; repeatable, the last match wins"
    )
    add("--weights-for", action="append", nargs="+", metavar="X", help=weights_for)
    normalize = "divide by the sum of the weights (default: on for linear, ties, della)"
    add("--normalize", action=argparse.BooleanOptionalAction, help=normalize)
    t = (
        "slerp: position between the first model (0) and the second (1); if the base is one of the two, 0 is the base "
        "(default: w2 / (w1 + w2))"
    )
    add("--t", type=number(), metavar="X", help=t)
    add_delta_flags(parser)

    add = parser.add_argument_group("arithmetic").add_argument
    arithmetic = "float32 as in mergekit; float64 takes twice the time and memory, and slerp is exact at small angles"
    add("--arithmetic", choices=["float32", "float64"], default="float32", help=arithmetic)
    add("--seed", type=int, default=0, help="seed of the random masks of dare_* and della*")
    add("--threads", type=at_least(1), help="tensors merged at once (default: as many as torch uses)")


def add_delta_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of methods that merge deltas. fill_options() sets their defaults."""
    add = parser.add_argument_group("methods that merge deltas").add_argument
    density = "ties, dare_*, breadcrumbs*, della*: share of a delta to keep, one number or one per model (default: 1)"
    add("--density", type=number(), nargs="+", metavar="X", help=density)
    gamma = "breadcrumbs*: share of the elements to drop, the largest ones (default: 0.01)"
    add("--gamma", type=number(0, below=1), metavar="X", help=gamma)
    epsilon = "della*: keep probabilities range from density - epsilon to density + epsilon (default: 0.15)"
    add("--epsilon", type=number(), metavar="X", help=epsilon)
    trim = (
        "ties: keep the largest elements of each tensor, as in mergekit, or of the whole model, as in the authors' "
        "code (default: tensor)"
    )
    add("--trim", choices=["tensor", "global"], help=trim)
    sign = "ties, *_ties, della: elect each sign by the sum of the deltas or by the count of their signs (default: sum)"
    add("--sign", choices=["sum", "count"], help=sign)
    rescale = (
        "l1: scale the kept elements to the whole delta's L1 norm, as in mergekit (default for dare_*, della*); "
        "density: divide each by its keep probability, as in their papers"
    )
    add("--rescale", choices=["none", "l1", "density"], help=rescale)
    add("--lambda", dest="scale", type=number(), metavar="X", help="factor on the merged delta (default: 1)")
    lines = (
        "LiNeS: scale the merged delta by ALPHA in the first block, rising linearly to ALPHA + BETA in the last; "
        "default BETA: 1 - ALPHA. auto: the authors' ALPHA for several models, "
        "|sum of deltas|_1 / |merged delta|_1 / n"
    )
    add("--lines", metavar="ALPHA[:BETA]|auto[:BETA]", help=lines)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses merge.py's arguments. args.command: "search", or "" without a command."""
    argv = sys.argv[1:] if argv is None else argv
    command = "search" if argv[:1] == ["search"] else ""
    args = parse_search_args(argv[1:]) if command else parse_merge_args(argv)
    args.command = command
    return args


def parse_merge_args(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of merge.py without a command."""
    about = "Merge checkpoints of one architecture into one. `merge.py search` finds the weights."
    parser = Parser(description=about)
    add_method_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=checkpoint_out, required=True, metavar="O", help="folder or .pt file to write")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of the output")
    most = "maximum size of a safetensors file, such as 5GB (default: one file for all)"
    add("--shard-size", type=parse_size, metavar="SIZE", help=most)
    args = parser.parse_args(argv)
    if args.shard_size and args.out.endswith(".pt"):
        raise InputError(f"--shard-size: {args.out} is a single file; use a folder as --out")
    return args


def parse_search_args(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of `merge.py search`."""
    parser = Parser(prog="merge.py search", description="Find the weights of a merge that do best on held-out data.")
    add_method_flags(parser)
    add_search_flags(parser)
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.tasks):
        raise InputError("--data or --tasks: give exactly one of them, to score the merges")
    if args.greedy and args.method != "linear":
        raise InputError(f"--greedy: averages models, so --method must be linear, not {args.method}")
    for name in args.over:
        if name != "weights" and args.method not in OPTIONS[name][1]:
            raise InputError(f"--over {name}: has no effect with --method {args.method}")
    if args.weights_for:
        raise InputError("--weights-for: the search sets one weight per model; use it with merge.py itself")
    return args


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("search").add_argument
    over = ["weights", "density", "lambda", "lines"]
    add("--over", nargs="+", choices=over, default=["weights"], help="what to search")
    greedy = (
        "greedy soup: choose the models to average (linear only). The best of all points tried is kept, even if it is "
        "one of the fixed pairs or the uniform soup"
    )
    add("--greedy", action="store_true", help=greedy)
    add("--evaluations", type=at_least(3), default=15, help="maximum number of points to try; not with --greedy")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="F", help="conversations, as for train_sft.py: minimise the loss on them")
    add("--tasks", nargs="+", metavar="T", help="tasks of eval.py: maximise the share of right answers")
    aside = "share of the data set aside for the final scores"
    add("--aside", type=number(above=0, below=1), default=0.5, metavar="X", help=aside)
    add(
        "--max-len",
        type=at_least(2),
        default=1024,
        help="maximum length of an example, in tokens; longer ones are cut at the end",
    )
    add("--data-dir", default="data", help="folder of the tasks' questions")
    add("--limit", type=at_least(1), help="questions per task (default: all)")
    add("--protocol", choices=["paper", "loglik"], default="paper", help="how answers are scored, see eval.py --help")
    add("--allow-code-execution", action="store_true", help="run the code that the merges write, in a sandbox")
    add("--max-new-tokens", type=at_least(1), default=1000, help="maximum length of a reply, in tokens")
    add("--batch-size", type=at_least(1), default=32, help="questions in flight")

    machine = parser.add_argument_group("machine")
    most = "maximum tokens of one forward (default: 16384 on a GPU, else 2048)"
    machine.add_argument("--micro-tokens", type=at_least(1), help=most)
    add_device_flags(machine, "dtype of the forward passes")

    out = "JSON file to write: all points and the final scores"
    parser.add_argument_group("output").add_argument(
        "--out", type=file_out('"versus_best"'), required=True, metavar="F.json", help=out
    )


# ---------------------------------------------------------------------------------------------------------------------
# Values of flags


def parse_finite(text: str, where: str) -> float:
    """The text as a finite number, or InputError. where: the start of the error line."""
    try:
        return number()(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise InputError(f"{where}: {text!r} is not a finite number") from None


def parse_model(text: str) -> tuple[str, float | None]:
    """'C' or 'C:WEIGHT' -> (C, weight or None). The path of an existing file may contain colons."""
    source, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, None
    if not source:
        raise InputError(f"--models {text}: write C or C:WEIGHT")
    return source, parse_finite(weight, f"--models {text}: the weight after the colon")


def parse_size(text: str) -> int:
    """'5GB', '500MB', '1000' -> bytes. GB is 10^9."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.upper())
    size = float(match[1]) * 1000 ** " KMGT".index(match[2] or " ") if match else 0.0
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(size)


def parse_lines(text: str) -> tuple[float | None, float | None]:
    """'ALPHA[:BETA]' or 'auto[:BETA]' -> (alpha, beta). auto: alpha is None. Default beta: 1 - alpha, or None."""
    first, colon, second = text.partition(":")
    alpha = None if first == "auto" else parse_finite(first, f"--lines {text}")
    if colon:
        return alpha, parse_finite(second, f"--lines {text}")
    return alpha, None if alpha is None else 1 - alpha


def format_lines(lines: tuple[float | None, float | None]) -> str:
    """The inverse of parse_lines."""
    alpha, beta = lines
    return ("auto" if alpha is None else f"{alpha:g}") + ("" if beta is None else f":{beta:g}")


def fill_options(args: argparse.Namespace, n: int) -> list[str]:
    """Checks the options, sets their defaults and args.densities. n: the number of models. Returns notes."""
    method, notes = args.method, []
    for flag, (attribute, scope, default) in OPTIONS.items():
        if getattr(args, attribute) is None:
            setattr(args, attribute, default)
        elif method not in scope:
            notes.append(f"--{flag} has no effect with --method {method}")
    fill_densities(args, n)
    if method in SPARSE and set(args.densities) == {1}:
        notes.append("--density is 1, so every element is kept (the TIES paper keeps 0.2)")
    if args.rescale is None:
        args.rescale = "l1" if method in RANDOM else "none"
    if args.rescale == "density" and method not in RANDOM:
        raise InputError(f"--rescale density: {method} keeps no elements at random; use l1")
    if args.rescale != "none" and args.trim == "global":
        raise InputError("--rescale: TIES as in its authors' code (--trim global) does not rescale; use --lambda")
    if args.normalize is None:
        args.normalize = method in ("linear", "ties", "della")
    if isinstance(args.lines, str):
        args.lines = parse_lines(args.lines)
    return notes


def fill_densities(args: argparse.Namespace, n: int) -> None:
    """Sets args.densities, one for each of the n models, or InputError."""
    if len(args.density) not in (1, n):
        raise InputError(f"--density: {len(args.density)} numbers for {n} models; give one, or one per model")
    args.densities = args.density * (1 if len(args.density) == n else n)
    for density in args.densities:
        if not 0 < density <= 1:
            raise InputError(f"--density {density}: the share of elements kept must be above 0 and at most 1")
        if args.method in DELLA and density < 1 and not args.epsilon < min(density, 1 - density):
            raise InputError(
                f"--epsilon {args.epsilon}: {density} - epsilon and {density} + epsilon must be between 0 and 1"
            )
