"""Merging tensor by tensor, from disk to disk."""

import collections
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial

import torch
from tqdm import tqdm

from core.checkpoint import all_finite
from core.files import InputError
from core.pages import WINDOW, mapped, page_chunks
from merging import methods
from merging.inputs import DARE, DELLA, ELECTS, SPARSE

# ---------------------------------------------------------------------------------------------------------------------
# Tensor by tensor


def flat_inputs(name, base, models):
    """The tensor of the reference (the base, else the first model) and those of the models, flat and as stored: a
    tensor of a mapped file is not read before it is used. -> (reference, [tensor] * n, those of them that are mapped)."""
    reference, tensors = (base or models[0]).tensor(name), [m.tensor(name) for m in models]
    for i, x in enumerate(tensors):
        if (
            x.shape != reference.shape
        ):  # --resize: a row that the model lacks is the reference's own, so it does not move
            tensors[i] = torch.cat([x, reference[len(x) :]])[: len(reference)]
    reference, *tensors = (x.contiguous().view(-1) for x in (reference, *tensors))
    return reference, tensors, mapped([reference, *tensors])


def magnitudes_of(x, reference, held, dtype, out=None):
    """|x - reference| in dtype, (m,), in out where that is given. held: as of chunks()."""
    size = torch.empty(len(x), dtype=dtype) if out is None else out
    for s in page_chunks(len(x), held, methods.CHUNK):
        torch.sub(x[s].to(dtype), reference[s].to(dtype), out=size[s]).abs_()
    return size


def keep_mask(magnitudes, shape, density, args, generator):
    """The elements of one delta that stay, as a mask (m,) or as magprune's probabilities; None where all do. shape:
    the tensor's, m its elements."""
    if density >= 1:
        return None
    if args.method == "ties":  # of each tensor, as in mergekit: max(1, int(density m))
        return methods.largest(magnitudes, max(1, int(density * math.prod(shape))))
    if args.method.startswith("breadcrumbs"):
        return methods.middle(magnitudes, density, args.gamma)
    if args.method in DELLA:
        rows = magnitudes().view(-1, shape[-1])
        return methods.magprune(rows, density, args.epsilon, generator, args.rescale == "density").view(-1)
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
    thresholds = [0.0 if k >= d else methods.kth_largest(partial(stream, i), k + 1, dtype) for i, k in enumerate(kept)]
    bars = torch.tensor(thresholds, dtype=dtype)[:, None]
    for name in bar("majority sign"):
        reference, xs, held = flat_inputs(name, base, models)
        for s in page_chunks(len(reference), held, methods.CHUNK):
            deltas = torch.stack([x[s].to(dtype) for x in xs]) - reference[s].to(dtype)
            deltas *= (deltas.abs() >= bars) * weights_of(name, args)[:, None]
            total += int(methods.elect_sign(deltas, args.sign, 0).sum(dtype=torch.float64))
    return thresholds, 1 if total > 0 else -1  # a majority of zero counts as negative in the authors' code


def make_tensor_merge(name, args, reference, xs, held, shape, trim):
    """All that must be known of one tensor before its first chunk: factors, thresholds, masks. -> merge(s, pieces, r), the
    elements s of the result out of those of the models and of the reference."""
    arithmetic, weights = getattr(torch, args.arithmetic), weights_of(name, args)
    if args.method == "linear":
        return lambda s, pieces, r: methods.linear(pieces, weights, args.normalize)
    if args.method == "slerp":
        straight = {"float32": 0.9995, "float64": 1.0}[args.arithmetic]
        a, b = methods.slerp_weights(*xs, float(weights[1] / weights.sum()), straight)
        return lambda s, pieces, r: (pieces[0] * a).add_(pieces[1] * b)

    factor = getattr(args, "lambda") * (methods.lines_scale(name, args.lines, args.n_layers) if args.lines else 1.0)
    masks, scales = [None] * len(xs), [1.0] * len(xs)
    if args.method in SPARSE and not trim:
        often = held if len(reference) > 4 * WINDOW else []  # the pages of a smaller one stay until its last pass
        for i, (x, density) in enumerate(zip(xs, args.densities)):
            magnitudes = partial(magnitudes_of, x, reference, often, arithmetic)
            masks[i] = keep_mask(magnitudes, shape, density, args, mask_generator(args.seed, name, i))
            if masks[i] is not None and args.rescale == "l1":
                scales[i] = methods.l1_scale(magnitudes(), masks[i])
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
            update = methods.ties(deltas, weights, args.sign, trim[1] if trim else 1, args.normalize)
        else:
            update = methods.task_arithmetic(deltas, weights, args.normalize)
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
    merge = make_tensor_merge(name, args, reference, xs, held, shape, trim)
    out, differs, lost = torch.empty(len(reference), dtype=dtype), 0, 0
    hashes = [hashlib.sha256() for _ in inputs if hashing]
    for s in page_chunks(len(reference), held, methods.CHUNK):
        stored = [x[s] for x in (*xs, reference)]
        for h, x in zip(
            hashes, stored
        ):  # now, while they are at hand: reading them again would cost as much as the merge
            h.update(x.view(torch.uint8).numpy())
        *pieces, r = (x.to(getattr(torch, args.arithmetic)) for x in stored)
        y = merge(s, pieces, r)
        out[s] = methods.rounded(y, dtype)
        if not all_finite(out[s]):
            bad = [c.source for c, x in zip(inputs, stored) if not all_finite(x)]
            kind = str(dtype).removeprefix("torch.")
            raise InputError(
                f"{bad[0]}: {name} holds NaN or infinity; take another save of it"
                if bad
                else f"{name}: not finite in {kind}: the merged values are too large for it; give another --dtype"
            )
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
