"""fusion.py by hand, against definitions in a few lines of numpy, and against mergekit 0.1.5's functions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import methods

NUMBERS = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=60)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Merges


def test_ties_by_hand():
    deltas = torch.tensor([[3.0, 1.0, 0.0, -2.0], [-1.0, 1.0, 0.0, -4.0], [2.0, -3.0, 5.0, 0.0]])
    one = torch.ones(3)
    assert methods.elect_sign(deltas).tolist() == [1, -1, 1, -1]
    assert methods.elect_sign(deltas, "count").tolist() == [1, 1, 1, -1]
    opposite = torch.tensor([[2.0], [-2.0]])
    assert methods.elect_sign(opposite).tolist() == [1] and methods.elect_sign(opposite, "sum", -1).tolist() == [-1]
    assert methods.ties(deltas, one).tolist() == [2.5, -3, 5, -3]
    assert methods.ties(deltas, one, "count").tolist() == [2.5, 1, 5, -3]
    assert methods.ties(deltas, one, normalize=False).tolist() == [5, -3, 5, -6]
    weights = torch.tensor([1.0, 6.0, 1.0])  # votes 3 - 6 + 2, 1 + 6 - 3, 5, -2 - 24
    assert torch.allclose(methods.ties(deltas, weights), torch.tensor([-1, 1, 5, -26 / 7]))
    # those that agree have weights 1 - 1 = 0: divided by 1, as in mergekit
    assert methods.ties(torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([1.0, -1.0, 1.0])).tolist() == [2]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 4), st.sampled_from(["sum", "count"]), st.sampled_from([1, -1]), st.booleans())
def test_ties_is_the_definition(data, n, how, zero_sign, normalize):
    """Whole numbers and halves, so that sums are exact and votes cancel."""
    row = lambda numbers: st.lists(numbers, min_size=n, max_size=n)
    deltas = np.array(data.draw(st.lists(row(st.integers(-4, 4)), min_size=1, max_size=30)), dtype=np.float32).T
    weights = np.array(data.draw(row(st.sampled_from([0.5, 1, 2, 4]))), dtype=np.float32)
    votes = deltas * weights[:, None] if how == "sum" else np.sign(deltas)
    want = []
    for delta, vote in zip(deltas.T, votes.T):
        sign = np.sign(vote.sum()) or zero_sign
        agree = np.sign(delta) == sign
        share = weights[agree].sum() if normalize and agree.any() else 1
        want.append((weights * delta)[agree].sum() / share)
    ours = methods.ties(torch.from_numpy(deltas.copy()), torch.from_numpy(weights), how, zero_sign, normalize)
    np.testing.assert_allclose(ours.numpy(), np.array(want, dtype=np.float32), rtol=1e-6)


def test_sign_by_count_equals_mergekit():
    method = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    deltas, weights = torch.randn(3, 500, generator=generator()), torch.tensor([0.5, 1.0, 2.0])
    weighted = deltas * weights[:, None]
    agree = method.get_mask(weighted, "count")
    theirs = (weighted * agree).sum(0) / (weights[:, None] * agree).sum(0).clamp(min=1e-9)
    assert torch.equal(methods.ties(deltas, weights, "count"), theirs)
    assert not torch.equal(methods.ties(deltas, weights, "sum"), theirs)


def slerp(a, b, t):
    at_a, at_b = methods.slerp_weights(a, b, t)
    return a * at_a + b * at_b


def test_slerp_by_hand():
    x, y = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 2, 0])
    r = 2 * math.sqrt(0.5)
    torch.testing.assert_close(slerp(x, y, 0.5), torch.tensor([r, r, 0]))
    torch.testing.assert_close(slerp(x, y, 1 / 3), torch.tensor([math.sqrt(3), 1, 0]))
    torch.testing.assert_close(slerp(x, torch.zeros(3), 0.5), x * math.sqrt(0.5))  # zeros: at right angles


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-6, 1e-3, 0.03, 0.0317, 0.1, math.pi - 1e-4, math.pi])
def test_slerp_stays_finite_and_true_at_any_angle(angle):
    t = 0.3
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
    out = slerp(x, y, t)
    if angle > 3:  # opposite: the arc is not defined, the straight line is
        torch.testing.assert_close(out, 0.7 * x + 0.3 * y)
    else:  # the straight line misses the arc by at most angle^2 / 8
        arc = torch.tensor([math.cos(t * angle), math.sin(t * angle)])
        torch.testing.assert_close(out, arc, rtol=0, atol=1.3e-4 if math.cos(angle) > 0.9995 else 1e-6)
        assert torch.equal(out, x * 0.7 + y * 0.3) == (math.cos(angle) > 0.9995)
    torch.testing.assert_close(slerp(x, y, 0.0), x)
    torch.testing.assert_close(slerp(x, y, 1.0), y)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-6, 1e-3, 0.03, 0.5, 3.0])
def test_slerp_keeps_to_the_arc_where_it_is_asked_to(angle):
    x, y = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0], [math.cos(angle), math.sin(angle)]))
    for t in (0.0, 0.3, 1.0):
        at = methods.slerp_weights(x, y, t, straight=1.0)
        arc = torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64)
        torch.testing.assert_close(at[0] * x + at[1] * y, arc, rtol=0, atol=1e-12)


def test_lines_rises_evenly_over_the_blocks():
    scale = lambda name: methods.lines_scale(name, (0.2, 0.6), 4)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    assert [round(scale(n), 6) for n in names] == [0.2, 0.4, 0.6, 0.8]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert scale(name) == 0.2
    assert {methods.lines_scale(n, (1.0, 0.0), 4) for n in names} == {1.0}
    assert (
        methods.lines_scale("model.layers.11.x", (0.0, 1.0), 12) == 1
        and methods.lines_scale(names[0], (0.3, 1.0), 1) == 0.3
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sparsification


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.data())
def test_kth_largest_is_the_sorted_one(values, data):
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    want = x.abs().sort(descending=True).values[k - 1].item()
    assert methods.kth_largest(lambda: [x[:cut], x[cut:]], k) == want
    y = x.double() * (1 + 1e-12 * torch.arange(len(x)))  # differ in the low bits only
    want = y.abs().sort(descending=True).values[k - 1].item()
    assert methods.kth_largest(lambda: [y[:cut], y[cut:]], k, torch.float64) == want


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.integers(-1, 70), st.booleans())
def test_largest_is_the_sorted_ones(values, k, first):
    size = np.abs(np.array(values, dtype=np.float32))
    order = np.argsort(-size, kind="stable") if first else np.argsort(size, kind="stable")[::-1]
    want = np.zeros(len(size), dtype=bool)
    want[order[: max(0, k)]] = True
    keep = methods.largest(lambda out=None: torch.from_numpy(size.copy()), k, first).numpy()
    assert ((keep == want) | (size == 0)).all()


def test_largest_by_hand():
    size = torch.tensor([1.0, 2, 2, 2, 0.5, 2])
    mask = lambda k, first=True: methods.largest(lambda out=None: size.clone(), k, first).int().tolist()
    assert mask(3) == [0, 1, 1, 1, 0, 0] and mask(3, first=False) == [0, 0, 1, 1, 0, 1]
    assert mask(5) == [1, 1, 1, 1, 0, 1] and mask(6) == [1] * 6 and mask(0) == [0] * 6


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.floats(0.01, 0.99), st.floats(0, 0.5))
def test_middle_is_the_definition(values, density, gamma):
    size = np.abs(np.array(values, dtype=np.float32))
    n_keep, n_top = int(density * len(size)), int(gamma * len(size))
    n_bottom = max(0, len(size) - n_keep - n_top)
    want = np.zeros(len(size), dtype=bool)
    want[np.argsort(size, kind="stable")[n_bottom : n_bottom + n_keep]] = True
    keep = methods.middle(lambda out=None: torch.from_numpy(size.copy()), density, gamma).numpy()
    assert ((keep == want) | (size == 0)).all()


@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.01), (0.9, 0.3), (0.5, 0.0), (0.001, 0.1)])
def test_middle_equals_mergekit(density, gamma):
    sparsify = pytest.importorskip("mergekit.sparsify")
    delta = torch.randn(37, 41, generator=generator())
    keep = methods.middle(lambda out=None: delta.abs().view(-1), density, gamma).view(delta.shape)
    assert torch.equal(delta * keep, sparsify.magnitude_outliers(delta, density, None, gamma))


@pytest.mark.parametrize("shape", [(30, 41), (97,), (5, 1)])
def test_magprune_equals_mergekit_given_the_same_numbers(monkeypatch, shape):
    sparsify = pytest.importorskip("mergekit.sparsify")
    monkeypatch.setattr(methods, "CHUNK", 100)  # several pieces of rows
    delta = torch.randn(shape, generator=generator())
    keep = methods.magprune(delta.abs().view(-1, shape[-1]), 0.4, 0.3, generator(7)).view(shape)
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=generator(7)) < p).float())
    if shape[-1] == 1:  # one element in a row has no rank: theirs divides 0 by 0
        assert torch.equal(keep.view(-1), torch.rand(5, generator=generator(7)) < 0.1)
    else:
        assert torch.equal(delta * keep, sparsify.della_magprune(delta, 0.4, 0.3, None))


def test_magprune_keeps_the_large_more_often():
    size = torch.rand(4000, 20, generator=generator()).sort(dim=1).values
    keep = methods.magprune(size, 0.4, 0.3, generator(1)).float()
    share = keep.mean(0)  # by rank: 0.1 for the smallest, 0.7 for the largest
    assert (share - torch.linspace(0.1, 0.7, 20)).abs().max() < 5 * math.sqrt(0.25 / 4000)


def test_magprune_gives_the_probabilities_that_the_paper_divides_by(monkeypatch):
    monkeypatch.setattr(methods, "CHUNK", 1000)
    size = torch.rand(20000, 8, generator=generator())
    keep, p = (methods.magprune(size, 0.5, 0.4, generator(2), kind) for kind in (False, True))
    assert torch.equal(p.isfinite(), keep)
    rank = size.argsort(1).argsort(1)
    want = 0.1 + rank / 7 * 0.8
    torch.testing.assert_close(p[keep], want[keep])
    # what stays, divided by its probability, is on average the whole: 1 at every rank, with the variance (1 - q) / q
    for r in range(8):
        q = 0.1 + r / 7 * 0.8
        assert abs((1 / p)[rank == r].mean() - 1) < 5 * math.sqrt((1 - q) / q / 20000)


def test_l1_scale():
    size, keep = torch.tensor([1.0, 2, 3, 4]), torch.tensor([True, False, False, True])
    assert methods.l1_scale(size, keep) == 2 and methods.l1_scale(size, ~keep & False) == 1
    assert methods.l1_scale(torch.zeros(4), keep) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-4, 6e4), st.integers(-3, 3), st.sampled_from([1, -1]))
def test_rounded_rounds_once(x, ulps, sign):
    """Numbers next to those halfway between two halves, by less than float32 can tell."""
    for bits, dtype in ((8, torch.bfloat16), (11, torch.float16)):
        m, e = math.frexp(x)
        half = math.ldexp((math.floor(m * 2**bits) + 0.5) / 2**bits, e)
        for y in (x, half, half * (1 + ulps * 2**-40)):
            m, e = math.frexp(y)
            want = math.ldexp(round(m * 2**bits) / 2**bits, e)  # to the nearest, exactly, halves to even
            if dtype == torch.bfloat16 or 6.2e-5 < want < 65000:  # where float16 has all its bits
                assert methods.rounded(torch.tensor([sign * y], dtype=torch.float64), dtype).item() == sign * want


def test_rounded_at_the_ends():
    x = torch.tensor(
        [0.0, -0.0, 1e300, -1e300, math.inf, math.nan, 1e-300, 65519.9, 65520.0, 2**-25 * 1.0000001],
        dtype=torch.float64,
    )
    with np.errstate(over="ignore"):
        theirs = torch.from_numpy(x.numpy().astype(np.float16))  # numpy rounds once
    torch.testing.assert_close(methods.rounded(x, torch.float16), theirs, rtol=0, atol=0, equal_nan=True)
    assert methods.rounded(x, torch.bfloat16)[2:6].isfinite().sum() == 0
    for y in (x, x.float()):
        assert methods.rounded(y, torch.float32).dtype == torch.float32
        torch.testing.assert_close(methods.rounded(y, torch.float32), y.float(), rtol=0, atol=0, equal_nan=True)
