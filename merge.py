"""Weight fusion: one checkpoint out of several, tensor by tensor from disk to disk, in fp32, rounded once at the end.

    python merge.py --method linear --models sft.pt:0.05 kto.pt:0.95 --out fused
    python merge.py --method ties --base base --models sft kto --density 0.2 --out fused.pt

Without --base, config and tokenizer are the first model's, else the base's. The numbers are those of mergekit 0.1.5;
`--method ties --trim global` is TIES as its authors' own code defines it.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from functools import partial

import torch
from tqdm import tqdm

from model import Checkpoint, InputError, cli, parse_config, write_checkpoint

CHUNK = 2**20  # elements worked on at once: intermediate results stay small, whatever the size of a tensor

# ---------------------------------------------------------------------------------------------------------------------
# The methods. A delta is (a model's tensor - the base's), all in fp32; the result is base + lambda * (one of the three
# merges of deltas). deltas: (n, m), n models by m elements; weights: (n,).


def linear(tensors, weights, normalize=True):
    """sum_i w_i x_i, over sum_i w_i with normalize (arXiv 2203.05482). tensors: n of one shape, taken one by one."""
    total = None
    for x, w in zip(tensors, weights):
        total = torch.zeros_like(x) if total is None else total
        total.add_(x, alpha=float(w))  # not total += w * x, which rounds twice
    return total.div_(weights.sum()) if normalize else total


def slerp(a, b, t):
    """From a (t = 0) to b (t = 1) along the arc of the angle between them, as flat vectors (doi 10.1145/325165.325242).

    sin((1-t) theta) / sin(theta) a + sin(t theta) / sin(theta) b. Above |cos theta| = 0.9995, which fine-tunes of one
    base always are, the straight line takes its place, as in mergekit.
    """

    def dot(x, y):  # in fp64: in fp32 the rounding of a long sum would move the angle
        return sum(float(p.double() @ q.double()) for p, q in zip(x.view(-1).split(CHUNK), y.view(-1).split(CHUNK)))

    norms = [math.sqrt(dot(x, x)) for x in (a, b)]
    norms = [n if n > 1e-8 else 1.0 for n in norms]  # a vector of zeros is at right angles to everything
    cosine = max(-1.0, min(1.0, dot(a, b) / (norms[0] * norms[1])))
    if abs(cosine) > 0.9995:
        at_a, at_b = 1 - t, t
    else:
        theta = math.acos(cosine)
        at_a, at_b = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    return (a * at_a).add_(b * at_b)


def task_arithmetic(deltas, weights, normalize=False):
    """sum_i w_i delta_i, over sum_i w_i with normalize (arXiv 2212.04089). (n, m), (n,) -> (m,)."""
    total = (deltas * weights[:, None]).sum(0)
    return total.div_(weights.sum()) if normalize else total


def kth_largest(stream, k):
    """The k-th largest magnitude (k >= 1), exactly, of all the fp32 tensors that stream() yields; it is called twice.

    The bits of a non-negative float order as integers do. The first pass counts how many elements fall into each of the
    2^15 values of the upper half of the bits, the second splits the one bucket that holds the k-th by the lower half.
    """
    bits = lambda: (p.abs().view(torch.int32) for x in stream() for p in x.reshape(-1).split(CHUNK))
    upper, above = locate(sum(torch.bincount(b >> 16, minlength=2**15) for b in bits()), k)
    in_bucket = (b[b >> 16 == upper] & 0xFFFF for b in bits())
    lower, _ = locate(sum(torch.bincount(b, minlength=2**16) for b in in_bucket), k - above)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def locate(counts, k):
    """The bin that holds the k-th element counted from the top, and how many lie above that bin."""
    from_top = counts.flip(0).cumsum(0)
    i = int(torch.searchsorted(from_top, k))
    return len(counts) - 1 - i, int(from_top[i] - counts.flip(0)[i])


def trim_tensor(delta, density):
    """TIES step 1 as in mergekit: the max(1, int(density n)) largest of this tensor stay, of equal ones the first."""
    if density >= 1:
        return delta
    k = max(1, int(density * delta.numel()))
    threshold = kth_largest(lambda: [delta], k)
    size = delta.abs()
    keep = size > threshold
    if threshold > 0:
        ties = (size == threshold).view(-1).nonzero()[: k - int(keep.sum()), 0]
        keep.view(-1)[ties] = True
    return delta.masked_fill_(~keep, 0)


def elect_sign(deltas, how="sum", zero_sign=1):
    """TIES step 2: the sign of the sum, or count of signs, over the models. (n, m) -> (m,); zero_sign where it is 0."""
    votes = (deltas if how == "sum" else deltas.sign()).sum(0).sign()
    return votes.masked_fill_(votes == 0, zero_sign)


def ties(deltas, weights, how="sum", zero_sign=1, normalize=True):
    """TIES steps 2 and 3 on trimmed deltas (arXiv 2306.01708, Algorithm 1): the weighted mean of those that agree with
    the elected sign; their sum without normalize. (n, m), (n,) -> (m,)."""
    deltas = deltas * weights[:, None]
    agree = deltas.sign() == elect_sign(deltas, how, zero_sign)  # a trimmed element has sign 0 and never agrees
    total = (deltas * agree).sum(0)
    if normalize:
        share = (weights[:, None] * agree).sum(0)
        total /= share.masked_fill_(share == 0, 1)
    return total


def dare(delta, density, generator):
    """DARE (arXiv 2311.03099): each element stays with probability density. What stays is rescaled to the L1 norm that
    the delta had, as mergekit does; the paper's factor 1/density is its expectation."""
    if density >= 1:
        return delta
    kept = delta * (torch.rand(delta.shape, generator=generator) < density)
    # The norms are summed in fp64, so that the result does not depend on the number of threads.
    norm = lambda x: sum(float(p.abs().sum(dtype=torch.float64)) for p in x.view(-1).split(CHUNK))
    before, after = norm(delta), norm(kept)
    return kept if min(before, after) < 1e-7 else kept.mul_(before / after)


def mask_generator(seed, name, i):
    """The random generator of model i's mask for one tensor: the same whatever the order of tensors and threads."""
    digest = hashlib.sha256(f"{seed} {name} {i}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs

NEEDS_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
# Options, the methods that they act on, and what they are when not given (mergekit's defaults; t follows the weights)
OPTIONS = {
    "t": (("slerp",), None),
    "density": (("ties", "dare_linear", "dare_ties"), 1.0),
    "lambda": (NEEDS_BASE, 1.0),
    "trim": (("ties",), "tensor"),
    "sign": (("ties", "dare_ties"), "sum"),
    "normalize": (("linear", *NEEDS_BASE), None),
}


def same(a, b):
    return os.path.realpath(a) == os.path.realpath(b)


def parse_model(text):
    """'C' or 'C:WEIGHT' -> (C, weight or None). A path that exists is taken whole, colons and all."""
    source, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, None
    try:
        weight = float(weight)
    except ValueError:
        weight = math.nan
    if not source or not math.isfinite(weight):
        raise InputError(f"--models {text}: what follows the colon is no finite number; write C or C:WEIGHT")
    return source, weight


def check_alike(a, b):
    """InputError unless checkpoint b has the tensors and shapes of a, and a config of the same forward pass."""
    for name in sorted({*a.names, *b.names}):
        for x, y in ((a, b), (b, a)):
            if name not in y.names:
                hint = "tie or untie both heads" if name == "lm_head.weight" else "merge models of one architecture"
                raise InputError(f"{y.source}: has no tensor {name}, but {x.source} has; {hint}")
        if a.shape(name) != b.shape(name):
            raise InputError(
                f"{b.source}: {name} is {b.shape(name)}, but {a.shape(name)} in {a.source}; no merge of the two"
            )
        if not b.dtype(name).is_floating_point:
            raise InputError(f"{b.source}: {name} is {b.dtype(name)}; only floating-point tensors are merged")
    config_a, config_b = (vars(parse_config(c.config, f"{c.source}/config.json")) for c in (a, b))
    for key, value in config_a.items():
        if value != config_b[key] and key != "max_position_embeddings":  # changes no number of the forward pass
            raise InputError(f"{b.source}: {key} is {config_b[key]} in its config, but {value} in that of {a.source}")


def open_inputs(args):
    """-> (base or None, models, their weights), all checked. What args leaves open is filled in."""
    given, method, notes = vars(args), args.method, []
    for option, (methods, default) in OPTIONS.items():
        if given[option] is None:
            given[option] = default
        elif method not in methods:
            notes.append(f"--{option} changes nothing with --method {method}")
        if isinstance(given[option], float) and not math.isfinite(given[option]):
            raise InputError(f"--{option} {given[option]}: not a finite number")
    if not 0 < args.density <= 1:
        raise InputError(f"--density {args.density}: the share of elements that stay must be above 0 and at most 1")
    if args.density == 1 and method in OPTIONS["density"][0]:
        notes.append("--density is 1, so every element stays (the TIES paper keeps 0.2)")
    if args.normalize is None:
        args.normalize = method in ("linear", "ties")

    parsed = [parse_model(text) for text in args.models]
    if any(same(source, args.out) for source in [args.base or "", *(s for s, _ in parsed)] if source):
        raise InputError(f"--out {args.out}: is one of the inputs; give another name")
    if method in NEEDS_BASE:
        if not args.base:
            raise InputError(f"--method {method}: needs --base C, the checkpoint that the models were trained from")
        if any(same(source, args.base) for source, _ in parsed):
            notes.append(f"{args.base} is the base: it has no delta and is left out of --models")
        parsed = [(source, w) for source, w in parsed if not same(source, args.base)]
        if not parsed:
            raise InputError("--models: holds nothing but the base; name the checkpoints that were trained from it")
    elif args.base:
        notes.append(f"--method {method} does not compute with --base; config and tokenizer are taken from it")
    weighted = any(w is not None for _, w in parsed)
    weights = [1.0 if w is None else w for _, w in parsed]
    if method == "slerp" and len(parsed) != 2:
        raise InputError(f"--method slerp: goes from one model to another; {len(parsed)} given in --models")
    if method == "slerp" and args.t is not None and weighted:
        raise InputError("--method slerp: give --t or weights, not both; with weights t is w2 / (w1 + w2)")
    if (args.normalize or method == "slerp") and abs(sum(weights)) < 1e-8:
        raise InputError(f"--models: the weights {weights} sum to zero and cannot be normalised; change one")
    if method == "slerp":
        if args.base and same(args.base, parsed[1][0]):  # as in mergekit, t = 0 is the base
            parsed, weights = parsed[::-1], weights[::-1]
        args.t = weights[1] / sum(weights) if args.t is None else args.t

    base = args.base and Checkpoint(args.base)
    models = [Checkpoint(source) for source, _ in parsed]
    donor = base or models[0]
    for m in [donor, *models]:
        check_alike(donor, m)
        if m.files.get("tokenizer.json") != donor.files.get("tokenizer.json"):
            notes.append(f"tokenizer.json of {m.source} differs from the one written, {donor.source}'s")
    for text in notes:  # after the checks: an error stands alone
        print(f"note: {text}", file=sys.stderr)
    return base, models, weights


# ---------------------------------------------------------------------------------------------------------------------
# Tensor by tensor


def read_deltas(base, models, name):
    b = base.tensor(name).float()
    return b, [m.tensor(name).float() - b for m in models]


def global_trim(args, base, models, weights):
    """What --trim global must know before the first tensor: each model's threshold over its whole delta, and the sign
    for elements whose votes cancel, which is the majority over all parameters. -> ([float] * n, +1 or -1).

    The authors keep what is >= the (d - int(d K))-th smallest magnitude: int(d K) + 1 elements, and all its equals.
    """
    d = sum(math.prod(base.shape(name)) for name in base.names)
    kept, total = int(d * args.density), 0
    bar = lambda title: tqdm(base.names, title, disable=None, leave=False)
    stream = lambda m: (read_deltas(base, [m], name)[1][0] for name in bar("threshold"))
    thresholds = [0.0 if kept >= d else kth_largest(partial(stream, m), kept + 1) for m in models]
    for name in bar("majority sign"):
        deltas = [trim_global(x, t).view(-1) for x, t in zip(read_deltas(base, models, name)[1], thresholds)]
        for pieces in zip(*(x.split(CHUNK) for x in deltas)):
            total += int(elect_sign(torch.stack(pieces) * weights[:, None], args.sign, 0).sum(dtype=torch.float64))
    return thresholds, 1 if total > 0 else -1  # a majority of zero counts as negative in the authors' code


def trim_global(delta, threshold):
    return delta.masked_fill_(delta.abs() < threshold, 0)


def merged_tensor(name, args, base, models, weights, thresholds, zero_sign):
    """One tensor of the result, in fp32."""
    if args.method == "linear":
        return linear((m.tensor(name).float() for m in models), weights, args.normalize)
    if args.method == "slerp":
        return slerp(*(m.tensor(name).float() for m in models), args.t)
    b, deltas = read_deltas(base, models, name)
    for i, delta in enumerate(deltas):
        if args.method == "ties":
            deltas[i] = trim_global(delta, thresholds[i]) if thresholds else trim_tensor(delta, args.density)
        elif args.method.startswith("dare"):
            deltas[i] = dare(delta, args.density, mask_generator(args.seed, name, i))
    out = torch.empty_like(b)
    for o, b_piece, *pieces in zip(*(x.view(-1).split(CHUNK) for x in [out, b, *deltas])):
        if args.method.endswith("ties"):
            update = ties(torch.stack(pieces), weights, args.sign, zero_sign, args.normalize)
        else:
            update = task_arithmetic(torch.stack(pieces), weights, args.normalize)
        torch.add(b_piece, update * getattr(args, "lambda"), out=o)
    return out


def merge(args, base, models, weights, counts):
    """Yields (name, tensor in the output dtype). counts: [elements that differ from the reference, those of them that
    rounding made equal to it], added up for output dtypes below fp32; the reference is the base or the first model."""
    dtype, weights = getattr(torch, args.dtype), torch.tensor(weights)
    thresholds, zero_sign = None, 1
    if args.method == "ties" and args.trim == "global":
        thresholds, zero_sign = global_trim(args, base, models, weights)
    for name in tqdm(models[0].names, "merge", disable=None):
        x = merged_tensor(name, args, base, models, weights, thresholds, zero_sign)
        out = x.to(dtype)
        if not torch.isfinite(out).all():
            raise InputError(f"{name}: not finite in {args.dtype}: NaN or infinity in an input, or too large")
        if dtype != torch.float32:
            reference = (base or models[0]).tensor(name).float().view(-1)
            for p, o, r in zip(x.view(-1).split(CHUNK), out.view(-1).split(CHUNK), reference.split(CHUNK)):
                differs = p != r
                counts[0] += int(differs.sum())
                counts[1] += int((differs & (o == r.to(dtype))).sum())
        yield name, out


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fuse checkpoints of one architecture into one.")
    add = parser.add_argument
    # checkpoints
    add("--models", required=True, nargs="+", metavar="C[:WEIGHT]", help="hub id, directory or .pt; weight (default 1)")
    add("--base", metavar="C", help="what the models were trained from; needed by all methods but linear and slerp")
    add("--out", required=True, metavar="O", help="directory, or a file *.pt, to write")
    # method
    add("--method", required=True, choices=["linear", "slerp", *NEEDS_BASE], help="how to fuse")
    add("--t", type=float, help="slerp: 0 is the first model (the base, if it is one of the two), 1 the other "
        "(default: w2 / (w1 + w2), so 0.5 without weights)")  # fmt: skip
    add("--density", type=float, metavar="X", help="ties, dare_*: share of a delta's elements that stay (default 1)")
    add("--lambda", type=float, metavar="X", help="factor on the merged delta (default 1)")
    add("--trim", choices=["tensor", "global"], help="ties: the largest of each tensor stay, as in mergekit "
        "(default), or of the whole model, as in the authors' code")  # fmt: skip
    add("--sign", choices=["sum", "count"], help="ties, dare_ties: elect signs by their sum (default) or count")
    add("--normalize", action=argparse.BooleanOptionalAction, help="divide by the weights' sum (default: linear, ties)")
    add("--seed", type=int, default=0, help="of the random masks of dare_* (default 0)")
    # output
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights written; the arithmetic is always float32 (default float32)")  # fmt: skip
    args = parser.parse_args(argv)

    start = time.time()
    base, models, weights = open_inputs(args)
    donor, dtype = base or models[0], getattr(torch, args.dtype)
    record = {k: v for k, v in vars(args).items() if k not in ("models", "base", "out")}
    inputs = [{"source": c.source, "sha256": c.fingerprint()} for c in [*models, *[base] * bool(base)]]
    record["models"] = [x | {"weight": w} for x, w in zip(inputs, weights)]
    record["base"] = inputs[-1] if base else None
    files = {**donor.files, "merge.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n"}
    specs = {name: (donor.shape(name), dtype) for name in donor.names}
    counts = [0, 0]
    write_checkpoint(args.out, donor.config, files, specs, merge(args, base, models, weights, counts))

    if counts[1] > 0.01 * counts[0]:
        print(f"warning: {counts[1] / counts[0]:.1%} of the elements that differ from {donor.source} in float32 equal "
              f"it in {args.dtype}: that part of the merge is lost; use --dtype float32", file=sys.stderr)  # fmt: skip
    n = sum(math.prod(shape) for shape, _ in specs.values())
    on = f" on {args.base}" if args.method in NEEDS_BASE else f", t = {args.t:g}" if args.method == "slerp" else ""
    print(f"{args.method} of " + ", ".join(f"{m.source}:{w:g}" for m, w in zip(models, weights)) + on)
    print(f"wrote {args.out}: {len(specs)} tensors, {n / 1e6:.1f} M parameters, {args.dtype}, "
          f"{n * dtype.itemsize / 1e6:.1f} MB in {time.time() - start:.1f} s")  # fmt: skip
    name = args.out.rstrip("/").removesuffix(".pt")
    print(f"next:  python eval.py --ckpt {args.out} --tasks gsm8k mmlu --out {name}.eval")


if __name__ == "__main__":
    cli(main)
