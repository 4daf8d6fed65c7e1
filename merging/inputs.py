"""The inputs of a merge: flags, checkpoints, and whether they fit together."""

import argparse
import math
import os
import re
import sys
from fnmatch import fnmatchcase

import torch

from core.checkpoint import Checkpoint
from core.config import parse_config
from core.files import InputError, same_path
from core.flags import at_least, number
from core.tokenizer import vocabulary

# ---------------------------------------------------------------------------------------------------------------------
# Inputs

NEEDS_BASE = (
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della_linear", "della", "expo",
)  # fmt: skip
SPARSE = NEEDS_BASE[1:-1]
DARE, DELLA = ("dare_linear", "dare_ties"), ("della_linear", "della")
RANDOM = DARE + DELLA
ELECTS = ("ties", "dare_ties", "breadcrumbs_ties", "della")  # those that elect signs
# Options, the methods that they act on, and what they are when not given (mergekit's defaults; None: see open_inputs)
OPTIONS = {
    "t": (("slerp",), None),
    "density": (SPARSE, [1.0]),
    "gamma": (("breadcrumbs", "breadcrumbs_ties"), 0.01),
    "epsilon": (DELLA, 0.15),
    "lambda": (NEEDS_BASE, 1.0),
    "lines": (NEEDS_BASE, None),
    "trim": (("ties",), "tensor"),
    "sign": (ELECTS, "sum"),
    "rescale": (SPARSE, None),
    "normalize": (("linear", *NEEDS_BASE[:-1]), None),
}


def parse_finite(text, where):
    """InputError unless the text is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: {text!r} is no finite number")
    return value


def parse_model(text):
    """'C' or 'C:WEIGHT' -> (C, weight or None). A path that exists is taken whole, colons and all."""
    source, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, None
    if not source:
        raise InputError(f"--models {text}: write C or C:WEIGHT")
    return source, parse_finite(weight, f"--models {text}: what follows the colon")


def parse_size(text):
    """'5GB', '500MB', '1000' -> bytes (GB is 10^9)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.upper())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def check_alike(a, b, resize, allow_tokenizer_mismatch):
    """InputError unless checkpoint b has the tensors and shapes of a, a config of the same forward pass, and a
    tokenizer of the same tokens. resize: embeddings may differ in their rows. -> notes, a list of texts."""
    notes, rows_differ = [], False
    for name in sorted({*a.names, *b.names}):
        for x, y in ((a, b), (b, a)):
            if name not in y.names:
                hint = "tie or untie both heads" if name == "lm_head.weight" else "merge models of one architecture"
                raise InputError(f"{y.source}: has no tensor {name}, but {x.source} has; {hint}")
        shapes, dtypes = (a.shape(name), b.shape(name)), (a.dtype(name), b.dtype(name))
        if shapes[0] != shapes[1]:
            by_row = name in ("model.embed_tokens.weight", "lm_head.weight") and shapes[0][1:] == shapes[1][1:]
            if not (by_row and resize):
                hint = f"--resize gives all of them {shapes[0][0]} rows" if by_row else "no merge of the two"
                raise InputError(f"{b.source}: {name} is {shapes[1]}, but {shapes[0]} in {a.source}; {hint}")
            rows_differ = True
            notes.append(f"{name} of {b.source} has {shapes[1][0]} rows; the result has {shapes[0][0]}, as {a.source}")
        if dtypes[0].is_floating_point != dtypes[1].is_floating_point:
            x, y = (a, b) if dtypes[1].is_floating_point else (b, a)  # x has no floats
            told = f"{x.source}: {name} is {x.dtype(name)}, but {y.dtype(name)} in {y.source}"
            raise InputError(f"{told}; only floats are merged")
    config_a, config_b = (vars(parse_config(c.config, f"{c.source}/config.json")) for c in (a, b))
    free = {"max_position_embeddings", "vocab_size" if rows_differ else ""}  # change no number of the forward pass
    for key, value in config_a.items():
        if value != config_b[key] and key not in free:
            raise InputError(f"{b.source}: {key} is {config_b[key]} in its config, but {value} in that of {a.source}")
    texts = [c.files.get("tokenizer.json") for c in (a, b)]
    if texts[0] != texts[1]:
        if None in texts:
            notes.append(
                f"{(a, b)[texts.index(None)].source} has no tokenizer.json; the one written is that of {a.source}"
            )
        elif vocabulary(a) != vocabulary(b):
            told = f"{b.source}: its tokenizer has other tokens than that of {a.source}"
            if not allow_tokenizer_mismatch:
                raise InputError(
                    f"{told}: a row would stand for two tokens; --allow-tokenizer-mismatch merges all the same"
                )
            notes.append(f"{told}, which is the one written")
    return notes


def fill_options(args, n):
    """Checks args' options, gives those that were not given what they are then. n: the models. -> notes."""
    given, method, notes = vars(args), args.method, []
    for option, (methods, default) in OPTIONS.items():
        if given[option] is None:
            given[option] = default
        elif method not in methods:
            notes.append(f"--{option} changes nothing with --method {method}")
    if len(args.density) not in (1, n):
        raise InputError(f"--density: {len(args.density)} numbers for {n} models; give one, or one for each")
    args.densities = args.density * (1 if len(args.density) == n else n)
    for d in args.densities:
        if not 0 < d <= 1:
            raise InputError(f"--density {d}: the share of elements that stay must be above 0 and at most 1")
        if method in DELLA and d < 1 and not args.epsilon < min(d, 1 - d):
            raise InputError(f"--epsilon {args.epsilon}: {d} - epsilon and {d} + epsilon must lie between 0 and 1")
    if method in SPARSE and set(args.densities) == {1}:
        notes.append("--density is 1, so every element stays (the TIES paper keeps 0.2)")
    if args.rescale is None:
        args.rescale = "l1" if method in RANDOM else "none"
    if args.rescale == "density" and method not in RANDOM:
        raise InputError(f"--rescale density: the elements of {method} do not stay by chance; use l1")
    if args.rescale != "none" and args.trim == "global":
        raise InputError("--rescale: the authors' TIES (--trim global) rescales nothing; use --lambda")
    if args.normalize is None:
        args.normalize = method in ("linear", "ties", "della")
    if isinstance(args.lines, str):
        alpha, colon, beta = args.lines.partition(":")
        alpha = parse_finite(alpha, f"--lines {args.lines}")
        args.lines = [alpha, parse_finite(beta, f"--lines {args.lines}") if colon else 1 - alpha]
    return notes


def open_inputs(args):
    """-> (base or None, models), all checked; sets args.weights, densities and n_layers and fills in the options."""
    method, n = args.method, len(args.models)
    parsed = [parse_model(text) for text in args.models]
    if args.out and any(same_path(source, args.out) for source in [args.base or "", *(s for s, _ in parsed)] if source):
        raise InputError(f"--out {args.out}: is one of the inputs; give another name")
    notes = fill_options(args, n)
    groups = []  # (pattern, a weight for each model)
    for pattern, *numbers in args.weights_for or []:
        if len(numbers) != n:
            raise InputError(f"--weights-for {pattern}: {len(numbers)} weights for {n} models; give one for each")
        groups.append((pattern, [parse_finite(w, f"--weights-for {pattern}") for w in numbers]))

    keep = list(range(n))  # the models that are no base
    if method in NEEDS_BASE:
        if not args.base:
            raise InputError(f"--method {method}: needs --base C, the checkpoint that the models were trained from")
        keep = [i for i in keep if not same_path(parsed[i][0], args.base)]
        if len(keep) < n:
            notes.append(f"{args.base} is the base: it has no delta and is left out of --models")
        if not keep:
            raise InputError("--models: holds nothing but the base; name the checkpoints that were trained from it")
    elif args.base:
        notes.append(f"--method {method} does not compute with --base; config and tokenizer are taken from it")
    if method == "slerp":
        if n != 2:
            raise InputError(f"--method slerp: goes from one model to another; {n} given in --models")
        if args.base and same_path(args.base, parsed[1][0]):  # as in mergekit, t = 0 is the base
            keep = [1, 0]
        if args.t is not None and any(w is not None for _, w in parsed):
            raise InputError("--method slerp: give --t or weights, not both; with weights t is w2 / (w1 + w2)")
    parsed, args.densities = ([x[i] for i in keep] for x in (parsed, args.densities))
    args.weights = [1.0 if w is None else w for _, w in parsed]
    if args.t is not None and method == "slerp":
        args.weights = [1 - args.t, args.t]
    args.weights_for = [(pattern, [w[i] for i in keep]) for pattern, w in groups]
    for _, weights in [("", args.weights), *args.weights_for]:
        if (args.normalize or method == "slerp") and abs(sum(weights)) < 1e-8:
            raise InputError(f"--models: the weights {weights} sum to zero and cannot be normalised; change one")
    if method == "expo" and (len(parsed) != 1 or args.weights[0] <= 1):
        raise InputError(
            "--method expo: goes beyond one model, away from --base; give one C:WEIGHT with a weight above 1"
        )

    base = args.base and Checkpoint(args.base)
    models = [Checkpoint(source) for source, _ in parsed]
    donor = base or models[0]
    for m in [donor, *models]:
        notes += check_alike(donor, m, args.resize, args.allow_tokenizer_mismatch)
    for pattern, _ in args.weights_for:
        if not any(fnmatchcase(f".{name}", f"*.{pattern}") for name in donor.names):
            raise InputError(f"--weights-for {pattern}: no tensor of {donor.source} has such a name; for example "
                             "'layers.[0-7].*', '*mlp*', embed_tokens.weight")  # fmt: skip
    args.n_layers = parse_config(donor.config).num_hidden_layers
    for text in notes:  # after the checks: an error stands alone
        print(f"note: {text}", file=sys.stderr)
    return base, models


# ---------------------------------------------------------------------------------------------------------------------
# The command


def add_method_flags(p):
    """The flags that say what to merge and how; those of the search too."""
    add = p.add_argument
    # checkpoints
    add("--models", required=True, nargs="+", metavar="C[:WEIGHT]", help="hub id, directory or .pt; weight (default 1)")
    add("--base", metavar="C", help="what the models were trained from; needed by all methods but linear and slerp")
    add(
        "--resize",
        action="store_true",
        help="embeddings of more rows than the base's are cut, of fewer take the base's",
    )
    add("--allow-tokenizer-mismatch", action="store_true", help="merge models whose tokenizers have other tokens")
    # method
    add("--method", required=True, choices=["linear", "slerp", *NEEDS_BASE], help="how to fuse")
    add("--weights-for", action="append", nargs="+", metavar="X",
        help="PATTERN W W ...: other weights, one a model, for the tensors whose names end in the pattern, such as "
        "'layers.[0-7].*' or '*mlp*'; may be repeated, the last that matches decides")  # fmt: skip
    add("--t", type=number(), help="slerp: 0 is the first model (the base, if it is one of the two), 1 the other "
        "(default: w2 / (w1 + w2), so 0.5 without weights)")  # fmt: skip
    add("--density", type=number(), nargs="+", metavar="X",
        help="ties, dare_*, breadcrumbs*, della*: share of a delta's elements that stay; one, or one a model "
        "(default 1)")  # fmt: skip
    add(
        "--gamma",
        type=number(0, below=1),
        metavar="X",
        help="breadcrumbs*: share of the largest elements that go (default 0.01)",
    )
    add(
        "--epsilon",
        type=number(),
        metavar="X",
        help="della*: elements stay with probability density ± this (default 0.15)",
    )
    add("--lambda", type=number(), metavar="X", help="factor on the merged delta (default 1)")
    add("--lines", metavar="ALPHA[:BETA]", help="scale the merged delta by ALPHA in the first block, rising evenly to "
        "ALPHA + BETA in the last (default BETA: 1 - ALPHA)")  # fmt: skip
    add("--trim", choices=["tensor", "global"], help="ties: the largest of each tensor stay, as in mergekit "
        "(default), or of the whole model, as in the authors' code")  # fmt: skip
    add("--sign", choices=["sum", "count"], help="ties, *_ties, della: elect signs by their sum (default) or count")
    add("--rescale", choices=["none", "l1", "density"], help="what stays of a delta: to the L1 norm of the whole, as in "
        "mergekit (default for dare_*, della*), or each element by 1/its probability to stay, as in the papers on both")  # fmt: skip
    add("--normalize", action=argparse.BooleanOptionalAction,
        help="divide by the weights' sum (default: linear, ties, della)")  # fmt: skip
    add("--arithmetic", choices=["float32", "float64"], default="float32",
        help="what is computed in: float32, as in mergekit, or float64, which costs twice the time and memory; "
        "slerp then keeps to the arc at small angles too")  # fmt: skip
    add("--seed", type=int, default=0, help="of the random masks of dare_* and della*")
    # machine
    add("--threads", type=at_least(1), default=torch.get_num_threads(), help="tensors in work at once")
