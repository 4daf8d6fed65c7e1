"""Merges checkpoints tensor by tensor, from disk to disk. merge.py passes the formulas in a Plan."""

import collections
import hashlib
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core.checkpoint import Checkpoint, all_finite
from core.files import InputError
from core.pages import WINDOW, mapped, page_chunks
from merging import methods
from merging.flags import BREADCRUMBS, DELLA, ELECTS, NEEDS_BASE, OPTIONS, RANDOM, SPARSE


@dataclass
class Plan:
    """The settings of a merge, the same for all tensors."""

    args: Namespace  # as completed by open_inputs()
    base: Checkpoint | None
    models: list[Checkpoint]
    sparsify: Callable | None  # magnitudes |delta|, density, options -> mask of the elements kept, of the same shape
    combine: Callable  # the models' tensors or deltas (n, m), weights (n,), options -> (m,)
    lines: tuple[float, float] | None = None  # LiNeS' alpha and beta
    thresholds: list[float] | None = None  # --trim global: the least magnitude that is kept, for each model
    zero_sign: int = 1  # the sign elected where the votes cancel

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint that gives names, shapes, config and tokenizer: the base, or else the first model."""
        return self.base or self.models[0]

    @property
    def arithmetic(self) -> torch.dtype:
        return getattr(torch, self.args.arithmetic)

    def weights(self, name: str) -> Tensor:
        """The models' weights for one tensor, (n,). The last --weights-for pattern that matches its name wins."""
        own = [w for pattern, w in self.args.weights_for if fnmatchcase(f".{name}", f"*.{pattern}")]
        return torch.tensor(own[-1] if own else self.args.weights, dtype=self.arithmetic)


@dataclass
class Stats:
    """Numbers that a merge collects for its manifest and for the warning about rounding."""

    changed: int = 0  # elements that differ from the reference in float32
    lost: int = 0  # of these, the elements that equal it again after rounding to the output's dtype
    lines: tuple[float, float] | None = None  # LiNeS' alpha and beta, as used
    digests: dict[str, list[str]] = field(default_factory=dict)  # tensor -> SHA-256 in each model, then in the base


@dataclass
class TensorInputs:
    """One tensor of all inputs: flat, (m,), in the stored dtype. Tensors of mapped files are read when used."""

    name: str
    shape: tuple[int, ...]
    reference: Tensor
    models: list[Tensor]
    mapped: list[Tensor]  # the tensors above that are in mapped files: pages already read can be dropped

    def chunks(self) -> Iterator[slice]:
        """Yields the slices to work on, in order. Drops pages of mapped files that were already read."""
        return page_chunks(len(self.reference), self.mapped, methods.CHUNK)

    def deltas(self, part: slice, dtype: torch.dtype) -> Tensor:
        """The models' deltas in dtype, (n, size of part)."""
        return torch.stack([x[part].to(dtype) for x in self.models]).sub_(self.reference[part].to(dtype))


def read_tensor(plan: Plan, name: str) -> TensorInputs:
    reference, models = plan.reference.tensor(name), [model.tensor(name) for model in plan.models]
    shape = tuple(reference.shape)
    for i, x in enumerate(models):
        if x.shape != reference.shape:  # --resize: missing rows are copied from the reference (zero delta)
            models[i] = torch.cat([x, reference[len(x) :]])[: len(reference)]
    reference, *models = (x.contiguous().view(-1) for x in (reference, *models))
    return TensorInputs(name, shape, reference, models, mapped([reference, *models]))


# ---------------------------------------------------------------------------------------------------------------------
# One tensor


def magnitudes_of(tensor: TensorInputs, i: int, dtype: torch.dtype) -> Tensor:
    """|delta| of model i in dtype, in the tensor's shape."""
    x, reference, out = tensor.models[i], tensor.reference, torch.empty(len(tensor.reference), dtype=dtype)
    large = len(reference) > 4 * WINDOW  # the pages of a smaller tensor are kept for the merge itself
    for s in page_chunks(len(reference), tensor.mapped if large else [], methods.CHUNK):
        torch.sub(x[s].to(dtype), reference[s].to(dtype), out=out[s]).abs_()
    return out.view(tensor.shape)


def mask_generator(seed: int, name: str, i: int) -> torch.Generator:
    """The random generator of model i's mask for one tensor. It does not depend on the order of tensors and threads."""
    digest = hashlib.sha256(f"{seed} {name} {i}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def make_sparsifier(plan: Plan, tensor: TensorInputs, i: int) -> Callable[[slice, Tensor], Tensor]:
    """Chooses the elements of model i's delta to keep. Returns sparsify(part, delta), which works in place."""
    args, density, options = plan.args, plan.args.densities[i], {}
    if plan.thresholds:
        return lambda part, delta: delta.masked_fill_(delta.abs() < plan.thresholds[i], 0)
    if args.method not in SPARSE or density >= 1:
        return lambda part, delta: delta
    if args.method in RANDOM:
        options["generator"] = mask_generator(args.seed, tensor.name, i)
    if args.method in BREADCRUMBS:
        options["gamma"] = args.gamma
    if args.method in DELLA:
        options |= {"epsilon": args.epsilon, "probabilities": args.rescale == "density"}
    magnitudes = magnitudes_of(tensor, i, plan.arithmetic)
    mask = plan.sparsify(magnitudes, density, **options).view(-1)
    if args.method in DELLA and args.rescale == "density":
        return lambda part, delta: delta.div_(mask[part])  # probabilities, infinite for dropped elements
    scale = 1.0
    if args.rescale == "l1":
        scale = methods.l1_scale(magnitudes.view(-1), mask)
    elif args.rescale == "density":  # DARE
        scale = 1 / density
    mask = mask.numpy()

    def sparsify(part: slice, delta: Tensor) -> Tensor:
        np.multiply(delta.numpy(), mask[part], out=delta.numpy())  # NumPy multiplies by a mask faster than torch
        return delta.mul_(scale)

    return sparsify


def combine_options(args: Namespace) -> dict:
    """{"normalize": bool} for the methods that take it."""
    return {"normalize": args.normalize} if args.method in OPTIONS["normalize"][1] else {}


def merged_deltas(plan: Plan, tensor: TensorInputs) -> Callable[[slice, Tensor], Tensor]:
    """Returns merge(part, deltas (n, c)) -> (c,), which sparsifies and combines the deltas of a part of the tensor."""
    sparsifiers = [make_sparsifier(plan, tensor, i) for i in range(len(tensor.models))]
    weights, args = plan.weights(tensor.name), plan.args
    options = combine_options(args)
    if args.method in ELECTS:
        options |= {"sign": args.sign, "zero_sign": plan.zero_sign}

    def merge(part: slice, deltas: Tensor) -> Tensor:
        for sparsify, delta in zip(sparsifiers, deltas):
            sparsify(part, delta)
        return plan.combine(deltas, weights, **options)

    return merge


def make_tensor_merge(plan: Plan, tensor: TensorInputs) -> Callable[[slice, list[Tensor], Tensor], Tensor]:
    """Computes everything that needs the whole tensor (masks, factors). Returns merge(part, pieces, reference) -> (c,).

    pieces: the models' elements of that part, n tensors (c,). reference: the reference's, (c,).
    """
    args, weights = plan.args, plan.weights(tensor.name)
    if args.method == "slerp":
        straight = {"float32": 0.9995, "float64": 1.0}[args.arithmetic]
        factors = plan.combine(*tensor.models, float(weights[1] / weights.sum()), straight)
        return lambda part, pieces, reference: (pieces[0] * factors[0]).add_(pieces[1] * factors[1])
    if args.method not in NEEDS_BASE:  # combines the models themselves
        return lambda part, pieces, reference: plan.combine(pieces, weights, **combine_options(args))
    scale = args.scale
    if plan.lines:
        scale *= methods.lines_scale(tensor.name, *plan.lines, args.n_layers)
    merge_deltas = merged_deltas(plan, tensor)

    def merge(part: slice, pieces: list[Tensor], reference: Tensor) -> Tensor:
        return reference + merge_deltas(part, torch.stack(pieces).sub_(reference)).mul_(scale)

    return merge


def check_merged_finite(name: str, result: Tensor, pieces: list[tuple[Checkpoint, Tensor]]) -> None:
    """InputError if the merged elements hold NaN or infinity. It names the input that holds them, if one does."""
    if all_finite(result):
        return
    for checkpoint, piece in pieces:
        if not all_finite(piece):
            raise InputError(f"{checkpoint.source}: {name} holds NaN or infinity; use another save of this checkpoint")
    kind = str(result.dtype).removeprefix("torch.")
    raise InputError(f"{name}: the merged values are not finite in {kind}: they are too large; use another --dtype")


def merge_tensor(plan: Plan, name: str, dtype: torch.dtype, hashing: bool) -> tuple[Tensor, int, int, list[str]]:
    """Merges one tensor. Returns (tensor in dtype, changed, lost, digests): see Stats. hashing: compute the digests.

    A tensor of integers is copied; InputError if the inputs differ.
    """
    tensor = read_tensor(plan, name)
    inputs = [*plan.models, plan.base] if plan.base else plan.models
    if not tensor.reference.dtype.is_floating_point:
        if any(not torch.equal(x, tensor.reference) for x in tensor.models):
            raise InputError(f"{name}: {tensor.reference.dtype}, and the inputs differ; only floats are merged")
        return tensor.reference.view(tensor.shape), 0, 0, [c.digest(name) for c in inputs if hashing]
    merge = make_tensor_merge(plan, tensor)
    out, changed, lost = torch.empty(len(tensor.reference), dtype=dtype), 0, 0
    hashes = [hashlib.sha256() for _ in inputs if hashing]
    for part in tensor.chunks():
        stored = [x[part] for x in (*tensor.models, tensor.reference)]
        for h, x in zip(hashes, stored):  # hash while the data are in memory: reading again costs as much as merging
            h.update(x.view(torch.uint8).numpy())
        *pieces, reference = (x.to(plan.arithmetic) for x in stored)
        result = merge(part, pieces, reference)
        out[part] = methods.rounded(result, dtype)
        check_merged_finite(name, out[part], list(zip(inputs, stored)))
        if dtype != torch.float32:
            moved = result.float() != reference.float()
            changed += int(moved.sum())
            lost += int((moved & (out[part] == reference.to(dtype))).sum())
    # with --resize the rows merged are not those stored
    digests = [h.hexdigest() if c.shape(name) == tensor.shape else c.digest(name) for h, c in zip(hashes, inputs)]
    return out.view(tensor.shape), changed, lost, digests


# ---------------------------------------------------------------------------------------------------------------------
# All tensors


def in_order(work: Callable, sizes: dict[str, int], threads: int) -> Iterator[tuple]:
    """Yields (name, work(name)) in the order of sizes, {name: elements}, computed by several threads.

    To bound memory, results that are running or waiting have at most 1.5 times the elements of the largest tensor.
    """
    todo, queue, in_flight, most = collections.deque(sizes), collections.deque(), 0, 1.5 * max(sizes.values())
    pool, before = ThreadPoolExecutor(threads), torch.get_num_threads()
    torch.set_num_threads(1)  # parallel over tensors, not inside an operation
    try:
        while todo or queue:
            while todo and (not queue or in_flight + sizes[todo[0]] <= most):
                name = todo.popleft()
                in_flight += sizes[name]
                queue.append((name, pool.submit(work, name)))
            name, future = queue.popleft()
            yield name, future.result()
            in_flight -= sizes[name]
            del future
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def each_tensor(plan: Plan, work: Callable, title: str, quiet: bool = False) -> Iterator[tuple]:
    """in_order() over all tensors of the result, with a progress bar."""
    sizes = {name: math.prod(plan.reference.shape(name)) for name in plan.reference.names}
    with tqdm(total=len(sizes), desc=title, unit="tensor", disable=quiet or None, leave=title == "merge") as progress:
        for name, result in in_order(work, sizes, plan.args.threads):
            progress.update()
            yield name, result
            del result  # free it before the next one is taken


def scan_magnitudes(plan: Plan) -> Callable:
    """The scan of methods.kth_largest over all deltas of the models."""

    def scan(f: Callable, stride: int) -> Iterator:
        def work(name: str) -> list:
            tensor = read_tensor(plan, name)
            every = lambda part: slice(part.start, part.stop, stride)
            return [f(tensor.deltas(every(part), plan.arithmetic).abs_()) for part in tensor.chunks()]

        for _, results in each_tensor(plan, work, "thresholds", quiet=True):
            yield from results

    return scan


def lines_alpha(plan: Plan) -> float:
    """LiNeS' alpha for n models, as in the authors' code: ||sum_i w_i delta_i||_1 / ||merged delta||_1 / n.

    The norms are over the whole model. The merged delta is the method's, before lambda. The authors have w = 1.
    """
    norms = torch.zeros(2, dtype=torch.float64)

    def tensor_norms(name: str) -> Tensor:
        tensor, sums = read_tensor(plan, name), torch.zeros(2, dtype=torch.float64)
        merge, weights = merged_deltas(plan, tensor), plan.weights(name)[:, None]
        for part in tensor.chunks():
            deltas = tensor.deltas(part, plan.arithmetic)
            both = torch.stack([(deltas * weights).sum(0), merge(part, deltas)])  # merge() last: it changes deltas
            sums += both.abs_().sum(1, dtype=torch.float64)
        return sums

    for _, sums in each_tensor(plan, tensor_norms, "LiNeS alpha"):
        norms += sums
    summed, merged = norms.tolist()
    return summed / merged / len(plan.models) if merged else 1.0


def merge_tensors(plan: Plan, dtype: torch.dtype, stats: Stats | None = None, quiet: bool = False) -> Iterator[tuple]:
    """Yields (name, tensor in dtype) for every tensor of the result.

    stats: filled in as the tensors are consumed; without it nothing is hashed. quiet: no progress bar.
    """
    work = lambda name: merge_tensor(plan, name, dtype, hashing=stats is not None)
    for name, (tensor, changed, lost, digests) in each_tensor(plan, work, "merge", quiet):
        if stats is not None:
            stats.changed, stats.lost = stats.changed + changed, stats.lost + lost
            stats.digests[name] = digests
        yield name, tensor
        del tensor  # free it before the next one is taken
