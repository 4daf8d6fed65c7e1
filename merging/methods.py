"""Weight fusion as pure functions on tensors: the merges of several models' tensors and the sparsifications of deltas.

A delta is (a model's tensor - the base's), in fp32 or fp64; a merge by deltas is base + lambda * (one of the merges of
sparsified deltas). deltas: (n, m), n models by m elements; weights: (n,). merge.py applies them to checkpoints.
"""

import math
import re

import numpy as np
import torch

CHUNK = 2**18  # elements worked on at once: they stay in the cache, whatever the size of a tensor

# ---------------------------------------------------------------------------------------------------------------------
# Merges


def linear(tensors, weights, normalize=True):
    """sum_i w_i x_i, over sum_i w_i with normalize (arXiv 2203.05482). tensors: n of one shape."""
    total = torch.zeros_like(tensors[0])
    for x, w in zip(tensors, weights):
        total.add_(x, alpha=float(w))  # not total += w * x, which rounds twice
    return total.div_(weights.sum()) if normalize else total


def slerp_weights(a, b, t, straight=0.9995):
    """The factors of a and b that lead from a (t = 0) to b (t = 1) along the arc of the angle between them, taken as
    flat vectors (doi 10.1145/325165.325242): sin((1-t) theta) / sin(theta) and sin(t theta) / sin(theta).

    Above cos theta = straight, and with vectors as good as opposite, the straight line takes its place: above 0.9995, where
    fine-tunes of one base always are, in mergekit. It misses the arc by theta^2 / 8 at most, relative to a and b.
    """

    def dot(x, y):  # in fp64: in fp32 the rounding of a long sum would move the angle
        return sum(float(p.double() @ q.double()) for p, q in zip(x.view(-1).split(CHUNK), y.view(-1).split(CHUNK)))

    norms = [math.sqrt(dot(x, x)) for x in (a, b)]
    norms = [n if n > 1e-8 else 1.0 for n in norms]  # a vector of zeros is at right angles to everything
    cosine = max(-1.0, min(1.0, dot(a, b) / (norms[0] * norms[1])))
    theta = math.acos(cosine)
    if theta == 0 or cosine > straight or cosine < -0.9995:
        return 1 - t, t
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def task_arithmetic(deltas, weights, normalize=False):
    """sum_i w_i delta_i, over sum_i w_i with normalize (arXiv 2212.04089). (n, m), (n,) -> (m,)."""
    total = (deltas * weights[:, None]).sum(0)
    return total.div_(weights.sum()) if normalize else total


def elect_sign(deltas, how="sum", zero_sign=1):
    """TIES step 2: the sign of the sum, or count of signs, over the models. (n, m) -> (m,); zero_sign where it is 0."""
    votes = (deltas if how == "sum" else deltas.sign()).sum(0).sign_()
    return votes.add_(0.5 * zero_sign).sign_()


def ties(deltas, weights, how="sum", zero_sign=1, normalize=True):
    """TIES steps 2 and 3 on trimmed deltas (arXiv 2306.01708, Algorithm 1): the weighted mean of those that agree with
    the elected sign; their sum without normalize. (n, m), (n,) -> (m,)."""
    deltas = deltas * weights[:, None]
    elected = elect_sign(deltas, how, zero_sign)
    agree = (deltas * elected).clamp_(min=0)  # the size of those that agree, else 0: no masks, which are slow on floats
    total = agree.sum(0).mul_(elected)
    if normalize:
        share = (agree.sign_() * weights[:, None]).sum(0)
        # 0 is divided by whatever is quick to put there; only weights of both signs leave a total over a share of 0
        total /= share.add_(1e-37) if (weights > 0).all() else torch.where(share == 0, 1.0, share)
    return total


def lines_scale(name, lines, n_layers):
    """LiNeS (arXiv 2410.17146, Eq. 2): the update of block l of 1 .. L is scaled by alpha + beta (l - 1) / (L - 1), all
    that lies outside the blocks by alpha, as in the authors' code. lines: (alpha, beta)."""
    block = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return lines[0] + (lines[1] * int(block[1]) / max(1, n_layers - 1) if block else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Sparsification: the mask of those elements of a delta that stay. size: |delta|, (m,), made anew at each call of
# magnitudes(out), in the memory of out where that is given.


def largest(magnitudes, k, first=True):
    """Mask (m,) of the k largest magnitudes, found in linear time; of equal ones at the edge the first stay, or the
    last. Zeros may be left out of it: it makes no difference whether they stay."""
    size = magnitudes()
    if k >= len(size):
        return torch.ones(len(size), dtype=torch.bool)
    if k <= 0:
        return torch.zeros(len(size), dtype=torch.bool)
    size.numpy().partition(len(size) - k)  # in place: the order is lost, so the magnitudes are made a second time
    threshold = float(size[len(size) - k])
    size = magnitudes(size)
    if threshold == 0:  # the equals are zeros; they may be most of a tensor, too many to list
        return size > 0
    keep = size >= threshold
    surplus = int(keep.count_nonzero()) - k
    if surplus:
        equals = np.flatnonzero(size.numpy() == threshold)
        keep.numpy()[equals[-surplus:] if first else equals[:surplus]] = False
    return keep


def middle(magnitudes, density, gamma):
    """Model Breadcrumbs (arXiv 2312.06795): int(density m) elements stay, those under the int(gamma m) largest."""
    m = len(magnitudes())
    n_keep, n_top = int(density * m), int(gamma * m)
    n_bottom = max(0, m - n_keep - n_top)  # fewer outliers go where density leaves no room for all
    return largest(magnitudes, m - n_bottom, first=False) & ~largest(magnitudes, m - n_bottom - n_keep, first=False)


def magprune(size, density, epsilon, generator, probabilities=False):
    """DELLA's MAGPRUNE (arXiv 2406.11617): an element stays with a probability that rises evenly with the rank of its
    magnitude in its row, from density - epsilon to density + epsilon. size: (rows, columns) -> mask of that shape.
    probabilities: in place of the mask, what the paper divides the delta by: the probability of what stays, else infinity."""
    columns, keep = size.shape[1], torch.empty(size.shape, dtype=torch.float32 if probabilities else torch.bool)
    step = max(1, CHUNK // columns)
    for s, k in zip(size.split(step), keep.split(step)):
        by_rank = torch.arange(columns, dtype=torch.float32).expand(s.shape)
        rank = torch.empty_like(s).scatter_(1, s.argsort(dim=1, stable=True), by_rank)
        probability = (density - epsilon) + rank / max(1, columns - 1) * 2 * epsilon
        stays = torch.rand(s.shape, generator=generator) < probability
        k.copy_(probability.where(stays, math.inf) if probabilities else stays)
    return keep


def l1_scale(size, keep):
    """The factor that gives what is kept the L1 norm of the whole; 1 where either is nothing. Summed in fp64."""
    norms = torch.zeros(2, dtype=torch.float64)
    for s, k in zip(size.split(CHUNK), keep.split(CHUNK)):
        norms += torch.stack([s.sum(dtype=torch.float64), (s * k).sum(dtype=torch.float64)])
    before, after = norms.tolist()
    return before / after if min(before, after) >= 1e-7 else 1.0


def kth_largest(stream, k, dtype=torch.float32):
    """The k-th largest magnitude (k >= 1), exactly, of all the tensors of this dtype (float32 or float64) that stream()
    yields; it is called once for every 16 bits.

    The bits of a non-negative float order as integers do. The first pass counts how many elements have each value of the
    upper 16 bits; the next splits the one bucket that holds the k-th by the 16 bits that follow, and so on.
    """
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    found = None  # the upper bits of the k-th, as far as known
    for shift in range(8 * dtype.itemsize - 16, -1, -16):
        bits = (p.abs().view(integer) for x in stream() for p in x.reshape(-1).split(CHUNK))
        if found is not None:
            bits = (b[b >> shift + 16 == found] for b in bits)
        value, above = bin_of_rank(sum(torch.bincount(b >> shift & 0xFFFF, minlength=2**16) for b in bits), k)
        found, k = (found or 0) << 16 | value, k - above
    return torch.tensor(found, dtype=integer).view(dtype).item()


def bin_of_rank(counts, k):
    """The bin that holds the k-th element counted from the top, and how many lie above that bin."""
    from_top = counts.flip(0).cumsum(0)
    i = int(torch.searchsorted(from_top, k))
    return len(counts) - 1 - i, int(from_top[i] - counts.flip(0)[i])


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def rounded(x, dtype):
    """x in dtype, rounded once: to half precision torch takes fp64 by way of fp32, which would round a second time."""
    if x.dtype != torch.float64 or dtype.itemsize > 2:
        return x.to(dtype)
    near = x.float()
    # an inexact fp32 whose last bit is 0 gives way to its neighbour on x's other side, whose last bit is 1: it is halfway
    # between no two halves, and lies where x lies
    away = torch.where(x > near, math.inf, -math.inf)
    even = near.view(torch.int32) & 1 == 0
    return torch.where((x != near) & even, near.nextafter(away), near).to(dtype)
