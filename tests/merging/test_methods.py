"""The merge formulas by hand, and against their definitions in a few lines of numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merge
from merging import methods

NUMBERS = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=60)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Merges


def test_ties_by_hand():
    deltas = torch.tensor([[3.0, 1.0, 0.0, -2.0], [-1.0, 1.0, 0.0, -4.0], [2.0, -3.0, 5.0, 0.0]])
    one = torch.ones(3)
    assert merge.elect_sign(deltas).tolist() == [1, -1, 1, -1]
    assert merge.elect_sign(deltas, "count").tolist() == [1, 1, 1, -1]
    opposite = torch.tensor([[2.0], [-2.0]])
    assert merge.elect_sign(opposite).tolist() == [1] and merge.elect_sign(opposite, "sum", -1).tolist() == [-1]
    assert merge.ties(deltas, one).tolist() == [2.5, -3, 5, -3]
    assert merge.ties(deltas, one, sign="count").tolist() == [2.5, 1, 5, -3]
    assert merge.ties(deltas, one, normalize=False).tolist() == [5, -3, 5, -6]
    weights = torch.tensor([1.0, 6.0, 1.0])  # votes 3 - 6 + 2, 1 + 6 - 3, 5, -2 - 24
    assert torch.allclose(merge.ties(deltas, weights), torch.tensor([-1, 1, 5, -26 / 7]))
    # those that agree have weights 1 - 1 = 0: divided by 1, as in mergekit
    assert merge.ties(torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([1.0, -1.0, 1.0])).tolist() == [2]


@settings(max_examples=100)
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
    ours = merge.ties(torch.from_numpy(deltas.copy()), torch.from_numpy(weights), normalize, how, zero_sign)
    np.testing.assert_allclose(ours.numpy(), np.array(want, dtype=np.float32), rtol=1e-6)


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
    scale = lambda name: methods.lines_scale(name, 0.2, 0.6, 4)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    assert [round(scale(n), 6) for n in names] == [0.2, 0.4, 0.6, 0.8]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert scale(name) == 0.2
    assert {methods.lines_scale(n, 1.0, 0.0, 4) for n in names} == {1.0}
    assert (
        methods.lines_scale("model.layers.11.x", 0.0, 1.0, 12) == 1
        and methods.lines_scale(names[0], 0.3, 1.0, 1) == 0.3
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sparsification


def scan_of(rows):
    """A scan as kth_largest takes it, over (n, m) magnitudes in chunks of 7 columns. scan.strides: of the scans made."""

    def scan(f, stride):
        scan.strides.append(stride)
        return [f(chunk[:, ::stride]) for chunk in rows.split(7, dim=1)]

    scan.strides = []
    return scan


@settings(max_examples=200)
@given(NUMBERS, st.data(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1, 3, 50]))
def test_kth_largest_is_the_sorted_one(values, data, dtype, sample):
    """Samples of almost nothing mislead often: the result is exact all the same."""
    m = len(values)
    rows = torch.tensor([values, [v / 3 if i % 2 else 0.0 for i, v in enumerate(values)]], dtype=dtype).abs()
    if dtype == torch.float64:
        rows *= 1 + 1e-12 * torch.arange(m)  # values that differ in the low bits only
    ks = [data.draw(st.integers(1, m)) for _ in rows]
    want = [x.kthvalue(m - k + 1).values.item() for x, k in zip(rows, ks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "SAMPLE", sample)
        assert methods.kth_largest(scan_of(rows), ks, m) == want
    assert [methods.kth_largest_plain(x, k) for x, k in zip(rows, ks)] == want


def test_kth_largest_reads_the_numbers_once_beside_a_sample(monkeypatch):
    monkeypatch.setattr(methods, "SAMPLE", 1000)
    rows = torch.randn(3, 100_000, generator=generator()).abs()
    rows[2, 20_000:] = 0  # most elements equal
    for ks in ([20_000, 50_000, 30_000], [1, 100_000, 1], [99_000, 5, 100_000]):
        scan = scan_of(rows)
        assert methods.kth_largest(scan, ks, 100_000) == [
            x.kthvalue(100_001 - k).values.item() for x, k in zip(rows, ks)
        ]
        assert scan.strides == [100, 1]
    collected = []
    monkeypatch.setattr(methods, "kth_largest_plain", lambda x, k: collected.append(len(x)) or 0.0)
    methods.kth_largest(scan_of(rows), [20_000, 50_000, 30_000], 100_000)
    assert sum(collected) < 50_000  # a few per cent of each, held in memory


def test_kth_largest_ends_where_a_number_is_nan():
    rows = torch.tensor([[1.0, math.nan, 3.0], [math.inf, math.nan, math.nan]])
    for k in (1, 2, 3):
        methods.kth_largest(scan_of(rows), [k, k], 3)


@settings(max_examples=100)
@given(NUMBERS, st.integers(-1, 70), st.booleans())
def test_largest_is_the_sorted_ones(values, k, first):
    size = np.abs(np.array(values, dtype=np.float32))
    order = np.argsort(-size, kind="stable") if first else np.argsort(size, kind="stable")[::-1]
    want = np.zeros(len(size), dtype=bool)
    want[order[: max(0, k)]] = True
    keep = methods.largest(torch.from_numpy(size), k, first).numpy()
    assert ((keep == want) | (size == 0)).all()


def test_largest_by_hand():
    size = torch.tensor([1.0, 2, 2, 2, 0.5, 2])
    mask = lambda k, first=True: methods.largest(size, k, first).int().tolist()
    assert mask(3) == [0, 1, 1, 1, 0, 0] and mask(3, first=False) == [0, 0, 1, 1, 0, 1]
    assert mask(5) == [1, 1, 1, 1, 0, 1] and mask(6) == [1] * 6 and mask(0) == [0] * 6


@settings(max_examples=100)
@given(NUMBERS, st.floats(0.01, 0.99), st.floats(0, 0.5))
def test_breadcrumbs_is_the_definition(values, density, gamma):
    size = np.abs(np.array(values, dtype=np.float32))
    n_keep, n_top = int(density * len(size)), int(gamma * len(size))
    n_bottom = max(0, len(size) - n_keep - n_top)
    want = np.zeros(len(size), dtype=bool)
    want[np.argsort(size, kind="stable")[n_bottom : n_bottom + n_keep]] = True
    keep = methods.breadcrumbs(torch.from_numpy(size), density, gamma).numpy()
    assert ((keep == want) | (size == 0)).all()


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


@settings(max_examples=200)
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
