"""Merge methods other than linear and TIES (see merge.py), sparsification of deltas, and exact selection.

A delta is a model's tensor minus the base's, in float32 or float64. A delta method gives base + lambda * (the merge of
the sparsified deltas). Shapes: n models, m elements of a tensor. deltas: (n, m). weights: (n,).
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**18  # elements per operation: small enough for the CPU's cache
SAMPLE = 2**15  # elements that are sorted to guess where the k-th largest is

# ---------------------------------------------------------------------------------------------------------------------
# Merges


def slerp_weights(first: Tensor, second: Tensor, t: float, straight: float = 0.9995) -> tuple[float, float]:
    """Spherical interpolation between two tensors, as flat vectors with angle theta (doi 10.1145/325165.325242).

    Returns the factors of the two: sin((1 - t) theta) / sin(theta) and sin(t theta) / sin(theta). t = 0: the first.
    Falls back to (1 - t, t) if cos theta > straight or the vectors are nearly opposite. mergekit has straight = 0.9995.
    Fine-tunes of one base always exceed it. The error is then at most theta^2 / 8, relative to the tensors.
    """

    def dot(x, y):  # in float64: float32 rounding over a long sum would change the angle
        return sum(float(p.double() @ q.double()) for p, q in zip(x.view(-1).split(CHUNK), y.view(-1).split(CHUNK)))

    norms = [math.sqrt(dot(x, x)) for x in (first, second)]
    norms = [n if n > 1e-8 else 1.0 for n in norms]  # a zero vector counts as orthogonal to everything
    cosine = max(-1.0, min(1.0, dot(first, second) / (norms[0] * norms[1])))
    theta = math.acos(cosine)
    if theta == 0 or cosine > straight or cosine < -0.9995:
        return 1 - t, t
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def task_arithmetic(deltas: Tensor, weights: Tensor, normalize: bool = False) -> Tensor:
    """sum_i w_i delta_i, divided by sum_i w_i with normalize (arXiv 2212.04089). (n, m), (n,) -> (m,)."""
    total = (deltas * weights[:, None]).sum(0)
    return total.div_(weights.sum()) if normalize else total


def lines_scale(name: str, alpha: float, beta: float, n_layers: int) -> float:
    """LiNeS' factor on the merged delta of one tensor (arXiv 2410.17146, Eq. 2).

    Block l of 1 .. L: alpha + beta (l - 1) / (L - 1). Tensors outside the blocks: alpha, as in the authors' code.
    """
    block = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return alpha + (beta * int(block[1]) / max(1, n_layers - 1) if block else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Sparsification: magnitudes |delta| -> a mask of the elements that are kept


def largest(magnitudes: Tensor, k: int, first: bool = True) -> Tensor:
    """Mask of the k largest magnitudes, (m,) -> (m,). first: of equal elements keep the first ones, else the last.

    Zeros may be missing from the mask, because keeping a zero changes nothing.
    """
    m = len(magnitudes)
    if k >= m:
        return torch.ones(m, dtype=torch.bool)
    if k <= 0:
        return torch.zeros(m, dtype=torch.bool)
    if m <= 4 * SAMPLE:
        threshold = kth_largest_plain(magnitudes, k)
    else:
        parts = magnitudes[None].split(CHUNK, dim=1)
        (threshold,) = kth_largest(lambda f, stride: (f(part[:, ::stride]) for part in parts), [k], m)
    if threshold == 0:  # the equals are zeros and can be most of the tensor: too many to list
        return magnitudes > 0
    keep = magnitudes.numpy() >= threshold  # NumPy compares and counts several times as fast as torch on a CPU
    surplus = np.count_nonzero(keep) - k
    if surplus:
        equals = np.flatnonzero(magnitudes.numpy() == threshold)
        keep[equals[-surplus:] if first else equals[:surplus]] = False
    return torch.from_numpy(keep)


def breadcrumbs(magnitudes: Tensor, density: float, gamma: float) -> Tensor:
    """Model Breadcrumbs (arXiv 2312.06795): drops the int(gamma m) largest, then keeps the int(density m) next ones.

    Any shape with m elements -> mask of that shape.
    """
    flat, m = magnitudes.view(-1), magnitudes.numel()
    n_keep, n_top = int(density * m), int(gamma * m)
    n_bottom = max(0, m - n_keep - n_top)  # if density leaves no room for gamma, fewer of the largest are dropped
    keep = largest(flat, m - n_bottom, first=False) & ~largest(flat, m - n_bottom - n_keep, first=False)
    return keep.view(magnitudes.shape)


def dare(magnitudes: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (arXiv 2311.03099): keeps each element with probability density. Any shape -> mask of that shape."""
    return (torch.rand(magnitudes.numel(), generator=generator) < density).view(magnitudes.shape)


def magprune(
    magnitudes: Tensor, density: float, epsilon: float, generator: torch.Generator, probabilities: bool = False
) -> Tensor:
    """DELLA's MAGPRUNE (arXiv 2406.11617): keeps an element with a probability that depends on its rank in its row.

    The probability rises linearly from density - epsilon (smallest) to density + epsilon (largest of the row).
    magnitudes: (..., columns) -> mask of that shape. probabilities: return the paper's divisor of the delta instead:
    the probability of each element kept, infinity for each dropped.
    """
    columns = magnitudes.shape[-1]
    size = magnitudes.view(-1, columns)  # (rows, columns)
    keep = torch.empty(size.shape, dtype=torch.float32 if probabilities else torch.bool)
    step = max(1, CHUNK // columns)
    for s, k in zip(size.split(step), keep.split(step)):
        by_rank = torch.arange(columns, dtype=torch.float32).expand(s.shape)
        rank = torch.empty_like(s).scatter_(1, s.argsort(dim=1, stable=True), by_rank)
        probability = (density - epsilon) + rank / max(1, columns - 1) * 2 * epsilon
        kept = torch.rand(s.shape, generator=generator) < probability
        k.copy_(probability.where(kept, math.inf) if probabilities else kept)
    return keep.view(magnitudes.shape)


def l1_scale(magnitudes: Tensor, keep: Tensor) -> float:
    """The factor that restores the delta's L1 norm after sparsification. (m,), (m,); 1 if either norm is zero."""
    norms = torch.zeros(2, dtype=torch.float64)
    for s, k in zip(magnitudes.split(CHUNK), keep.split(CHUNK)):
        norms += torch.stack([s.sum(dtype=torch.float64), (s * k).sum(dtype=torch.float64)])
    before, after = norms.tolist()
    return before / after if min(before, after) >= 1e-7 else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Selection: the k-th largest of more numbers than fit in memory


def kth_largest_plain(x: Tensor, k: int) -> float:
    """The k-th largest element of x (m,), k >= 1. The plain twin of kth_largest: simpler, but copies x."""
    i = len(x) - k
    return float(np.partition(x.numpy(), i)[i])


@dataclass
class RankSelection:
    """The selection of the k-th largest of one model's magnitudes. It is strictly between low and high until found."""

    k: int
    inside: int  # magnitudes between low and high
    above: int = 0  # magnitudes >= high
    low: float = -1.0
    high: float = math.inf
    found: float | None = None

    def bracket(self, sample: np.ndarray) -> tuple[float, float]:
        """Two values that almost surely enclose the k-th largest. sample: some of the magnitudes inside.

        Their ranks in the sample are six standard deviations from its expected rank.
        """
        size, share = len(sample), (self.k - self.above) / self.inside  # share: how far down it is
        rank, slack = share * size, 6 * math.sqrt(size * share * (1 - share)) + 6
        order = np.sort(sample)[::-1]  # NumPy sorts several times as fast as torch on a CPU
        first, last = math.floor(rank - slack), math.ceil(rank + slack)
        return (float(order[last]) if last < size else self.low), (float(order[first]) if first >= 0 else self.high)

    def narrow(self, low: float, high: float, counts: Sequence[tuple[int, int, int, Tensor]]) -> None:
        """Finds the k-th largest, or narrows the range that it is in. counts: count_in_bracket of every chunk."""
        above, from_high, from_low = (sum(chunk[j] for chunk in counts) for j in range(3))
        if self.k <= above:  # the sample misled: look above the bracket
            self.low, self.inside = high, above - self.above
        elif self.k <= from_high:
            self.found = high
        elif self.k > from_low and low > self.low:  # the sample misled: look below the bracket
            self.high, self.inside, self.above = low, self.above + self.inside - from_low, from_low
        else:
            between, rank = torch.cat([chunk[3] for chunk in counts]), self.k - from_high
            self.found = kth_largest_plain(between, rank) if rank <= len(between) else low


def kth_largest(scan: Callable[..., Iterable], ks: Sequence[int], m: int) -> list[float]:
    """The k-th largest magnitude (k >= 1) of each of n models, exactly, in two scans; more only if the sample misleads.

    scan(f, stride): calls f on every stride-th column of each chunk (n, c) of the magnitudes, in any order; yields the
    results. ks: one k for each model. m: the number of magnitudes of each model.

    The first scan takes a sample, which gives two values that almost surely enclose the k-th largest. The second counts
    the elements above and at these values, and collects the few in between.
    """
    selections, stride = [RankSelection(k, inside=m) for k in ks], max(1, m // SAMPLE)
    while any(selection.found is None for selection in selections):
        samples = scan(lambda chunk: [x[(x > s.low) & (x < s.high)] for x, s in zip(chunk.numpy(), selections)], stride)
        brackets = [s.bracket(np.concatenate(parts)) for s, parts in zip(selections, zip(*samples))]
        counts = scan(lambda chunk: [count_in_bracket(x, *ends) for x, ends in zip(chunk, brackets)], 1)
        for selection, ends, parts in zip(selections, brackets, zip(*counts)):
            if selection.found is None:
                selection.narrow(*ends, parts)
        stride = max(1, stride // 16)  # a narrower range needs a denser sample
    return [selection.found for selection in selections]


def count_in_bracket(x: Tensor, low: float, high: float) -> tuple[int, int, int, Tensor]:
    """The number of elements of x (c,) that are > high, >= high and >= low; and those with low < x < high."""
    x = x.numpy()
    at_least_low = x >= low
    part = x[at_least_low & (x <= high)]
    from_low = np.count_nonzero(at_least_low)
    above = from_low - len(part)
    between = torch.from_numpy(part[(part > low) & (part < high)])
    return above, above + np.count_nonzero(part == high), from_low, between


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, rounded once. Torch converts float64 to half precision through float32, which rounds twice."""
    if x.dtype != torch.float64 or dtype.itemsize > 2:
        return x.to(dtype)
    near = x.float()
    # Round to odd: an inexact float32 with an even last bit is replaced by its neighbour on the side of x. This is
    # never halfway between two half-precision numbers, so the second rounding is correct.
    away = torch.where(x > near, math.inf, -math.inf)
    even = near.view(torch.int32) & 1 == 0
    return torch.where((x != near) & even, near.nextafter(away), near).to(dtype)
