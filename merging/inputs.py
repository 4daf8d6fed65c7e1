"""The inputs of a merge: its flags, its checkpoints, and the checks that they fit together."""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from core.checkpoint import Checkpoint
from core.config import parse_config
from core.files import InputError, same_path
from core.flags import at_least, number
from core.outputs import check_inputs
from core.tokenizer import vocabulary

# ---------------------------------------------------------------------------------------------------------------------
# Methods and their options

DARE, DELLA, BREADCRUMBS = ("dare_linear", "dare_ties"), ("della_linear", "della"), ("breadcrumbs", "breadcrumbs_ties")
RANDOM = DARE + DELLA  # masks are drawn at random
SPARSE = ("ties", *DARE, *BREADCRUMBS, *DELLA)  # keep a share of each delta's elements
ELECTS = ("ties", "dare_ties", "breadcrumbs_ties", "della")  # elect a sign for each element
NEEDS_BASE = ("task_arithmetic", *SPARSE, "expo")  # merge deltas
# flag: (attribute of args, methods it acts on, default: mergekit's; None is resolved by fill_options)
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


def add_method_flags(parser: argparse.ArgumentParser, methods: Iterable[str]) -> None:
    """Adds the flags for inputs and method, for merge.py and its search. methods: choices of --method."""
    add = parser.add_argument
    # checkpoints
    add("--models", required=True, nargs="+", metavar="C[:WEIGHT]", help="hub id, folder or .pt; default weight: 1")
    add("--base", metavar="C", help="checkpoint the models were trained from; optional for linear and slerp")
    resize = "cut or extend embeddings to the rows of --base, or of the first model; missing rows are copied from it"
    add("--resize", action="store_true", help=resize)
    add("--allow-tokenizer-mismatch", action="store_true", help="merge models whose tokenizers have different tokens")
    # method
    add("--method", required=True, choices=list(methods), help="how to merge")
    groups = "PATTERN W W ...: one weight per model for the tensors whose names end in PATTERN, such as "
    groups += "'layers.[0-7].*' or '*mlp*'; repeatable, the last match wins"
    add("--weights-for", action="append", nargs="+", metavar="X", help=groups)
    normalize = "divide by the sum of the weights; default: on for linear, ties, della"
    add("--normalize", action=argparse.BooleanOptionalAction, help=normalize)
    t = "slerp: position between the first model, or the base if it is one of the two (0), and the other (1); default: "
    add("--t", type=number(), metavar="X", help=t + "w2 / (w1 + w2)")
    add_delta_flags(parser)
    # arithmetic and machine
    arithmetic = "float32 as in mergekit; float64 takes twice the time and memory, and slerp is exact at small angles"
    add("--arithmetic", choices=["float32", "float64"], default="float32", help=arithmetic)
    add("--seed", type=int, default=0, help="seed of the random masks of dare_* and della*")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), help="tensors merged at once")


def add_delta_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of methods that merge deltas. fill_options() sets their defaults."""
    add = parser.add_argument
    # deltas
    density = "ties, dare_*, breadcrumbs*, della*: share of a delta's elements to keep, one number or one per model"
    add("--density", type=number(), nargs="+", metavar="X", help=density + "; default: 1")
    gamma = "breadcrumbs*: share of the elements to drop, the largest ones; default: 0.01"
    add("--gamma", type=number(0, below=1), metavar="X", help=gamma)
    epsilon = "della*: keep probabilities range over density ± this; default: 0.15"
    add("--epsilon", type=number(), metavar="X", help=epsilon)
    trim = "ties: keep the largest elements of each tensor (mergekit) or of the whole model (the authors' code); "
    add("--trim", choices=["tensor", "global"], help=trim + "default: tensor")
    sign = "ties, *_ties, della: elect each sign by the sum of the deltas or by the count of their signs; default: sum"
    add("--sign", choices=["sum", "count"], help=sign)
    rescale = "l1: scale the kept elements to the whole delta's L1 norm, as in mergekit (default for dare_*, della*); "
    rescale += "density: divide each by its keep probability, as in their papers"
    add("--rescale", choices=["none", "l1", "density"], help=rescale)
    add("--lambda", dest="scale", type=number(), metavar="X", help="factor on the merged delta; default: 1")
    lines = "LiNeS: scale the merged delta by ALPHA in the first block, rising linearly to ALPHA + BETA in the last; "
    lines += "default BETA: 1 - ALPHA. auto: the authors' ALPHA for several models, "
    lines += "|sum of deltas|_1 / |merged delta|_1 / n"
    add("--lines", metavar="ALPHA[:BETA]|auto[:BETA]", help=lines)


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
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


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


# ---------------------------------------------------------------------------------------------------------------------
# Checks that two checkpoints can be merged


def check_alike(first: Checkpoint, other: Checkpoint, resize: bool, allow_tokenizer_mismatch: bool) -> list[str]:
    """InputError unless both have the same tensors and shapes, architecture, and tokens. Returns notes.

    resize: embeddings may have different numbers of rows.
    """
    resized = check_same_tensors(first, other, resize)
    expected, found = (vars(parse_config(c.config, f"{c.source}/config.json")) for c in (first, other))
    ignored = {"max_position_embeddings", "vocab_size" if resized else ""}  # do not change the forward pass
    for key, value in expected.items():
        if value != found[key] and key not in ignored:
            raise InputError(f"{other.source}: {key} is {found[key]} in its config, but {value} in {first.source}")
    return resized + check_tokenizers(first, other, allow_tokenizer_mismatch)


def check_same_tensors(first: Checkpoint, other: Checkpoint, resize: bool) -> list[str]:
    """InputError unless both have the same tensors, in the same shapes. Returns a note for each resized tensor."""
    notes = []
    for name in sorted({*first.names, *other.names}):
        for has, lacks in ((first, other), (other, first)):
            if name not in lacks.names:
                hint = "tie or untie both heads" if name == "lm_head.weight" else "merge models of one architecture"
                raise InputError(f"{lacks.source}: has no tensor {name}, but {has.source} has; {hint}")
        expected, found = first.shape(name), other.shape(name)
        if expected != found:
            rows_only = name in ("model.embed_tokens.weight", "lm_head.weight") and expected[1:] == found[1:]
            if not (rows_only and resize):
                hint = f"--resize gives all of them {expected[0]} rows" if rows_only else "they cannot be merged"
                raise InputError(f"{other.source}: {name} is {found}, but {expected} in {first.source}; {hint}")
            notes.append(
                f"{name} of {other.source} has {found[0]} rows; the result has {expected[0]}, as {first.source}"
            )
        if first.dtype(name).is_floating_point != other.dtype(name).is_floating_point:
            integers, floats = (first, other) if other.dtype(name).is_floating_point else (other, first)
            kinds = f"{name} is {integers.dtype(name)}, but {floats.dtype(name)} in {floats.source}"
            raise InputError(f"{integers.source}: {kinds}; only floats are merged")
    return notes


def check_tokenizers(first: Checkpoint, other: Checkpoint, allow_mismatch: bool) -> list[str]:
    """InputError if the tokenizers have different tokens, unless that is allowed. Returns notes."""
    texts = [c.files.get("tokenizer.json") for c in (first, other)]
    if texts[0] == texts[1]:
        return []
    if None in texts:
        without = (first, other)[texts.index(None)]
        return [f"{without.source} has no tokenizer.json; the output gets that of {first.source}"]
    if vocabulary(first) == vocabulary(other):
        return []
    mismatch = f"{other.source}: its tokenizer has other tokens than that of {first.source}"
    if not allow_mismatch:
        raise InputError(f"{mismatch}: a row would have two meanings; --allow-tokenizer-mismatch merges anyway")
    return [f"{mismatch}; the output gets that of {first.source}"]


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_inputs(args: argparse.Namespace) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """Opens and checks the base (or None) and the models, and completes args.

    Sets args.weights, args.densities and args.weights_for (one number per model, without models that are the base) and
    args.n_layers.
    """
    n, parsed = len(args.models), [parse_model(text) for text in args.models]
    if args.out:
        check_inputs(args.out, [source for source in (args.base, *(s for s, _ in parsed)) if source])
    notes = fill_options(args, n)
    groups = []  # (pattern, one weight per model)
    for pattern, *numbers in args.weights_for or []:
        if len(numbers) != n:
            raise InputError(f"--weights-for {pattern}: {len(numbers)} weights for {n} models; give one per model")
        groups.append((pattern, [parse_finite(w, f"--weights-for {pattern}") for w in numbers]))
    kept = choose_models(args, parsed, notes)
    parsed, args.densities = ([x[i] for i in kept] for x in (parsed, args.densities))
    args.weights_for = [(pattern, [w[i] for i in kept]) for pattern, w in groups]
    args.weights = [1.0 if w is None else w for _, w in parsed]
    if args.t is not None and args.method == "slerp":
        args.weights = [1 - args.t, args.t]
    check_weights(args)
    if args.lines and args.lines[0] is None and len(args.weights) == 1:
        raise InputError("--lines auto: needs several models, one is given; give ALPHA as a number")

    base, models = args.base and Checkpoint(args.base), [Checkpoint(source) for source, _ in parsed]
    donor = base or models[0]
    for checkpoint in [donor, *models]:
        notes += check_alike(donor, checkpoint, args.resize, args.allow_tokenizer_mismatch)
    for pattern, _ in args.weights_for:
        if not any(fnmatchcase(f".{name}", f"*.{pattern}") for name in donor.names):
            examples = "'layers.[0-7].*', '*mlp*', embed_tokens.weight"
            raise InputError(f"--weights-for {pattern}: matches no tensor of {donor.source}; patterns are {examples}")
    args.n_layers = parse_config(donor.config).num_hidden_layers
    for text in notes:  # after all checks: an error is printed alone
        print(f"note: {text}", file=sys.stderr)
    return base, models


def choose_models(args: argparse.Namespace, parsed: list[tuple[str, float | None]], notes: list[str]) -> list[int]:
    """The indices of the models to merge, in order. A model that is the base is left out. Adds to notes.

    parsed: (source, weight or None) of --models.
    """
    method, kept = args.method, list(range(len(parsed)))
    if method in NEEDS_BASE:
        if not args.base:
            raise InputError(f"--method {method}: needs --base C, the checkpoint that the models were trained from")
        kept = [i for i in kept if not same_path(parsed[i][0], args.base)]
        if not kept:
            raise InputError("--models: only the base is given; name the checkpoints that were trained from it")
        if len(kept) < len(parsed):
            notes.append(f"{args.base} is the base: it has no delta and is left out of --models")
    elif args.base:
        notes.append(f"--method {method} does not use the weights of --base; config and tokenizer are taken from it")
    if method == "slerp":
        if len(parsed) != 2:
            raise InputError(f"--method slerp: needs two models; {len(parsed)} given in --models")
        if args.t is not None and any(weight is not None for _, weight in parsed):
            raise InputError("--method slerp: give --t or weights, not both; with weights t is w2 / (w1 + w2)")
        if args.base and same_path(args.base, parsed[1][0]):  # as in mergekit, t = 0 is the base
            kept = [1, 0]
    return kept


def check_weights(args: argparse.Namespace) -> None:
    for _, weights in [("", args.weights), *args.weights_for]:
        if (args.normalize or args.method == "slerp") and math.isclose(sum(weights), 0, abs_tol=1e-8):
            raise InputError(f"--models: the weights {weights} sum to zero and cannot be normalised; change one")
    if args.method == "expo" and (len(args.weights) != 1 or args.weights[0] <= 1):
        raise InputError("--method expo: extrapolates one model from --base; give one C:WEIGHT with a weight above 1")
