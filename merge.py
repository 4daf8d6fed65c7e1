"""Weight fusion: one checkpoint out of several, tensor by tensor from disk to disk, in fp32 or fp64, rounded once.

    python merge.py --method linear --models sft.pt:0.05 kto.pt:0.95 --out fused
    python merge.py --method ties --base base --models sft kto --density 0.2 --out fused.pt
    python merge.py search --help                                # weights that do best on held-out data

Without --base, config and tokenizer are the first model's, else the base's. The numbers are those of mergekit 0.1.5;
`--method ties --trim global` is TIES as its authors' own code defines it, `--rescale density` DARE and DELLA as their
papers do.
"""

import argparse
import collections
import hashlib
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial

import torch
from tqdm import tqdm

import fusion
from chat import vocabulary
from checkpoint import WINDOW, Checkpoint, InputError, all_finite, chunks, cli, mapped, parse_config, same, write_checkpoint
from flags import Parser, at_least, checkpoint_out, number

# ---------------------------------------------------------------------------------------------------------------------
# Tensor by tensor


def flat_inputs(name, base, models):
    """The tensor of the reference (the base, else the first model) and those of the models, flat and as stored: a
    tensor of a mapped file is not read before it is used. -> (reference, [tensor] * n, those of them that are mapped)."""
    reference, tensors = (base or models[0]).tensor(name), [m.tensor(name) for m in models]
    for i, x in enumerate(tensors):
        if x.shape != reference.shape:  # --resize: a row that the model lacks is the reference's own, so it does not move
            tensors[i] = torch.cat([x, reference[len(x) :]])[: len(reference)]
    reference, *tensors = (x.contiguous().view(-1) for x in (reference, *tensors))
    return reference, tensors, mapped([reference, *tensors])


def magnitudes_of(x, reference, held, dtype, out=None):
    """|x - reference| in dtype, (m,), in out where that is given. held: as of chunks()."""
    size = torch.empty(len(x), dtype=dtype) if out is None else out
    for s in chunks(len(x), held, fusion.CHUNK):
        torch.sub(x[s].to(dtype), reference[s].to(dtype), out=size[s]).abs_()
    return size


def keep_mask(magnitudes, shape, density, args, generator):
    """The elements of one delta that stay, as a mask (m,) or as magprune's probabilities; None where all do. shape:
    the tensor's, m its elements."""
    if density >= 1:
        return None
    if args.method == "ties":  # of each tensor, as in mergekit: max(1, int(density m))
        return fusion.largest(magnitudes, max(1, int(density * math.prod(shape))))
    if args.method.startswith("breadcrumbs"):
        return fusion.middle(magnitudes, density, args.gamma)
    if args.method in DELLA:
        rows = magnitudes().view(-1, shape[-1])
        return fusion.magprune(rows, density, args.epsilon, generator, args.rescale == "density").view(-1)
    return torch.rand(math.prod(shape), generator=generator) < density  # DARE (arXiv 2311.03099)


def mask_generator(seed, name, i):
    """The random generator of model i's mask for one tensor: the same whatever the order of tensors and threads."""
    digest = hashlib.sha256(f"{seed} {name} {i}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def weights_of(name, args):
    """The models' weights for one tensor, (n,): of the patterns that match its name the last one's, else --models'."""
    own = [w for pattern, w in args.weights_for if fnmatchcase(f".{name}", f"*.{pattern}")]
    return torch.tensor(own[-1] if own else args.weights, dtype=getattr(torch, args.arithmetic))


def global_trim(args, base, models):
    """What --trim global must know before the first tensor: each model's threshold over its whole delta, and the sign
    for elements whose votes cancel, which is the majority over all parameters. -> ([float] * n, +1 or -1).

    The authors keep what is >= the (d - int(d K))-th smallest magnitude: int(d K) + 1 elements, and all its equals.
    """
    d, total, dtype = sum(math.prod(base.shape(name)) for name in base.names), 0, getattr(torch, args.arithmetic)
    bar = lambda title: tqdm(base.names, title, disable=None, leave=False)

    def stream(i):
        for name in bar("threshold"):
            reference, xs, held = flat_inputs(name, base, models)
            yield magnitudes_of(xs[i], reference, held, dtype)

    kept = [int(d * density) for density in args.densities]
    thresholds = [0.0 if k >= d else fusion.kth_largest(partial(stream, i), k + 1, dtype) for i, k in enumerate(kept)]
    bars = torch.tensor(thresholds, dtype=dtype)[:, None]
    for name in bar("majority sign"):
        reference, xs, held = flat_inputs(name, base, models)
        for s in chunks(len(reference), held, fusion.CHUNK):
            deltas = torch.stack([x[s].to(dtype) for x in xs]) - reference[s].to(dtype)
            deltas *= (deltas.abs() >= bars) * weights_of(name, args)[:, None]
            total += int(fusion.elect_sign(deltas, args.sign, 0).sum(dtype=torch.float64))
    return thresholds, 1 if total > 0 else -1  # a majority of zero counts as negative in the authors' code


def recipe(name, args, reference, xs, held, shape, trim):
    """All that must be known of one tensor before its first chunk: factors, thresholds, masks. -> merge(s, pieces, r), the
    elements s of the result out of those of the models and of the reference."""
    arithmetic, weights = getattr(torch, args.arithmetic), weights_of(name, args)
    if args.method == "linear":
        return lambda s, pieces, r: fusion.linear(pieces, weights, args.normalize)
    if args.method == "slerp":
        straight = {"float32": 0.9995, "float64": 1.0}[args.arithmetic]
        a, b = fusion.slerp_weights(*xs, float(weights[1] / weights.sum()), straight)
        return lambda s, pieces, r: (pieces[0] * a).add_(pieces[1] * b)

    factor = getattr(args, "lambda") * (fusion.lines_scale(name, args.lines, args.n_layers) if args.lines else 1.0)
    masks, scales = [None] * len(xs), [1.0] * len(xs)
    if args.method in SPARSE and not trim:
        often = held if len(reference) > 4 * WINDOW else []  # the pages of a smaller one stay until its last pass
        for i, (x, density) in enumerate(zip(xs, args.densities)):
            magnitudes = partial(magnitudes_of, x, reference, often, arithmetic)
            masks[i] = keep_mask(magnitudes, shape, density, args, mask_generator(args.seed, name, i))
            if masks[i] is not None and args.rescale == "l1":
                scales[i] = fusion.l1_scale(magnitudes(), masks[i])
            elif args.method in DARE and args.rescale == "density":
                scales[i] = 1 / density

    def merge(s, pieces, r):
        deltas = torch.stack(pieces).sub_(r)  # (n, chunk)
        for i, (delta, mask) in enumerate(zip(deltas, masks)):
            if trim:
                delta.masked_fill_(delta.abs() < trim[0][i], 0)
            elif mask is not None and mask.is_floating_point():
                delta.div_(mask[s])
            elif mask is not None:
                delta.mul_(mask[s]).mul_(scales[i])
        if args.method in ELECTS:
            update = fusion.ties(deltas, weights, args.sign, trim[1] if trim else 1, args.normalize)
        else:
            update = fusion.task_arithmetic(deltas, weights, args.normalize)
        return r + update.mul_(factor)

    return merge


def merged_tensor(name, args, base, models, trim, dtype, hashing):
    """One tensor of the result, in dtype. trim: global_trim's, or None. -> (tensor, the number of elements that differ
    from the reference in fp32, the number of those that rounding to dtype made equal to it, and with hashing the digests
    of the tensors that were read: the models', then the base's)."""
    reference, xs, held = flat_inputs(name, base, models)
    inputs, shape = [*models, base] if base else models, (base or models[0]).shape(name)
    if not reference.dtype.is_floating_point:
        if any(not torch.equal(x, reference) for x in xs):
            raise InputError(f"{name}: {reference.dtype} and not the same in all inputs; only floats are merged")
        return reference.view(shape), 0, 0, [c.digest(name) for c in inputs if hashing]
    merge = recipe(name, args, reference, xs, held, shape, trim)
    out, differs, lost = torch.empty(len(reference), dtype=dtype), 0, 0
    hashes = [hashlib.sha256() for _ in inputs if hashing]
    for s in chunks(len(reference), held, fusion.CHUNK):
        stored = [x[s] for x in (*xs, reference)]
        for h, x in zip(hashes, stored):  # now, while they are at hand: reading them again would cost as much as the merge
            h.update(x.view(torch.uint8).numpy())
        *pieces, r = (x.to(getattr(torch, args.arithmetic)) for x in stored)
        y = merge(s, pieces, r)
        out[s] = fusion.rounded(y, dtype)
        if not all_finite(out[s]):
            bad = [c.source for c, x in zip(inputs, stored) if not all_finite(x)]
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"{bad[0]}: {name} holds NaN or infinity; take another save of it" if bad
                             else f"{name}: not finite in {kind}: the merged values are too large for it; give another --dtype")
        if dtype != torch.float32:
            moved = y.float() != r.float()
            differs, lost = differs + int(moved.sum()), lost + int((moved & (out[s] == r.to(dtype))).sum())
    # --resize: what was merged is not what is stored
    digests = [h.hexdigest() if c.shape(name) == shape else c.digest(name) for h, c in zip(hashes, inputs)]
    return out.view(shape), differs, lost, digests


def in_order(work, sizes, threads):
    """Yields (name, work(name)) in the order of sizes ({name: elements}), computed by `threads` at once. Tensors that are being
    computed or wait to be taken have at most 1.5 times the elements of the largest one, which bounds the memory."""
    todo, queue, ahead, most = collections.deque(sizes), collections.deque(), 0, 1.5 * max(sizes.values())
    pool, before = ThreadPoolExecutor(threads), torch.get_num_threads()
    torch.set_num_threads(1)  # the threads are the parallelism
    try:
        while todo or queue:
            while todo and (not queue or ahead + sizes[todo[0]] <= most):
                name = todo.popleft()
                ahead += sizes[name]
                queue.append((name, pool.submit(work, name)))
            name, future = queue.popleft()
            yield name, future.result()
            ahead -= sizes[name]
            del future
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def merged(args, base, models, dtype, found=None, quiet=False):
    """Yields (name, tensor in dtype) for every tensor of the result. found: {"differs": 0, "lost": 0, "digests": {}}, to
    which is added what merged_tensor returns; without it nothing is hashed. quiet: without a progress bar."""
    trim = global_trim(args, base, models) if args.method == "ties" and args.trim == "global" else None
    donor = base or models[0]
    sizes = {name: math.prod(donor.shape(name)) for name in donor.names}
    work = lambda name: merged_tensor(name, args, base, models, trim, dtype, found is not None)
    with tqdm(total=len(sizes), desc="merge", unit="tensor", disable=quiet or None) as bar:
        for name, (tensor, differs, lost, digests) in in_order(work, sizes, args.threads):
            if found is not None:
                found["differs"], found["lost"] = found["differs"] + differs, found["lost"] + lost
                found["digests"][name] = digests
            bar.update()
            yield name, tensor
            del tensor  # before the next one is taken: they may be large


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


def finite(text, where):
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
    return source, finite(weight, f"--models {text}: what follows the colon")


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
            notes.append(f"{(a, b)[texts.index(None)].source} has no tokenizer.json; the one written is that of {a.source}")
        elif vocabulary(a) != vocabulary(b):
            told = f"{b.source}: its tokenizer has other tokens than that of {a.source}"
            if not allow_tokenizer_mismatch:
                raise InputError(f"{told}: a row would stand for two tokens; --allow-tokenizer-mismatch merges all the same")
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
        alpha = finite(alpha, f"--lines {args.lines}")
        args.lines = [alpha, finite(beta, f"--lines {args.lines}") if colon else 1 - alpha]
    return notes


def open_inputs(args):
    """-> (base or None, models), all checked; sets args.weights, densities and n_layers and fills in the options."""
    method, n = args.method, len(args.models)
    parsed = [parse_model(text) for text in args.models]
    if args.out and any(same(source, args.out) for source in [args.base or "", *(s for s, _ in parsed)] if source):
        raise InputError(f"--out {args.out}: is one of the inputs; give another name")
    notes = fill_options(args, n)
    groups = []  # (pattern, a weight for each model)
    for pattern, *numbers in args.weights_for or []:
        if len(numbers) != n:
            raise InputError(f"--weights-for {pattern}: {len(numbers)} weights for {n} models; give one for each")
        groups.append((pattern, [finite(w, f"--weights-for {pattern}") for w in numbers]))

    keep = list(range(n))  # the models that are no base
    if method in NEEDS_BASE:
        if not args.base:
            raise InputError(f"--method {method}: needs --base C, the checkpoint that the models were trained from")
        keep = [i for i in keep if not same(parsed[i][0], args.base)]
        if len(keep) < n:
            notes.append(f"{args.base} is the base: it has no delta and is left out of --models")
        if not keep:
            raise InputError("--models: holds nothing but the base; name the checkpoints that were trained from it")
    elif args.base:
        notes.append(f"--method {method} does not compute with --base; config and tokenizer are taken from it")
    if method == "slerp":
        if n != 2:
            raise InputError(f"--method slerp: goes from one model to another; {n} given in --models")
        if args.base and same(args.base, parsed[1][0]):  # as in mergekit, t = 0 is the base
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
        raise InputError("--method expo: goes beyond one model, away from --base; give one C:WEIGHT with a weight above 1")

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
    add("--resize", action="store_true", help="embeddings of more rows than the base's are cut, of fewer take the base's")
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
    add("--gamma", type=number(0, below=1), metavar="X", help="breadcrumbs*: share of the largest elements that go (default 0.01)")
    add("--epsilon", type=number(), metavar="X", help="della*: elements stay with probability density ± this (default 0.15)")
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


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["search"]:
        import merge_search  # here, as it imports this file

        return merge_search.main(argv[1:])
    parser = Parser(description="Fuse checkpoints of one architecture into one. `merge.py search` finds "
                                     "the weights.")  # fmt: skip
    add_method_flags(parser)
    # output
    parser.add_argument("--out", type=checkpoint_out, required=True, metavar="O", help="directory to write, or a .pt file (held in memory)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights written")  # fmt: skip
    parser.add_argument("--shard-size", type=parse_size, metavar="SIZE", help="largest safetensors file, such as 5GB; "
        "several and an index are written where one does not do (default: one file)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.shard_size and args.out.endswith(".pt"):
        raise InputError(f"--shard-size: {args.out} is one file; give a directory as --out")

    start = time.time()
    base, models = open_inputs(args)
    donor, dtype = base or models[0], getattr(torch, args.dtype)
    found = {"differs": 0, "lost": 0, "digests": {}}
    told = lambda: json.dumps(record(args, base, models, found["digests"]), indent=2, ensure_ascii=False) + "\n"
    kept = {name: donor.dtype(name) for name in donor.names}
    specs = {name: (donor.shape(name), dtype if t.is_floating_point else t) for name, t in kept.items()}
    tensors = merged(args, base, models, dtype, found)
    size = sum(math.prod(shape) * t.itemsize for shape, t in specs.values())
    write_checkpoint(args.out, donor.config, donor.files | {"merge.json": told}, specs, tensors, args.shard_size)

    if found["lost"] > 0.01 * found["differs"]:
        share = found["lost"] / found["differs"]
        print(f"warning: {share:.1%} of the elements that differ from {donor.source} in float32 equal it in {args.dtype}: "
              "that part of the merge is lost; use --dtype float32", file=sys.stderr)  # fmt: skip
    n = sum(math.prod(shape) for shape, _ in specs.values())
    print(f"{args.method} of " + ", ".join(f"{m.source}:{w:g}" for m, w in zip(models, args.weights))
          + (f" on {args.base}" if args.method in NEEDS_BASE else ""))  # fmt: skip
    print(f"wrote {args.out}: {len(specs)} tensors, {n / 1e6:.1f} M parameters, {args.dtype}, {size / 1e6:.1f} MB in "
          f"{time.time() - start:.1f} s")  # fmt: skip
    name = args.out.removesuffix(".pt")
    print(f"next:  python eval.py --ckpt {args.out} --tasks gsm8k mmlu --out {name}.eval")


def record(args, base, models, digests):
    """What merge.json says: the options that the method has, the models with what is their own, and fingerprints.
    digests: merged()'s."""
    options = {k: getattr(args, k) for k, (methods, _) in OPTIONS.items() if args.method in methods and k != "density"}
    inputs = [*models, base] if base else models
    sums = [c.fingerprint({name: d[i] for name, d in digests.items()}) for i, c in enumerate(inputs)]
    own = [{"source": m.source, "sha256": s, "weight": w} for m, s, w in zip(models, sums, args.weights)]
    if args.method in SPARSE:
        own = [x | {"density": d} for x, d in zip(own, args.densities)]
    return {
        "method": args.method, **options, "weights_for": args.weights_for, "seed": args.seed, "arithmetic": args.arithmetic,
        "dtype": args.dtype, "resize": args.resize, "models": own,
        "base": {"source": base.source, "sha256": sums[-1]} if base else None,
    }  # fmt: skip


if __name__ == "__main__":
    cli(main)
