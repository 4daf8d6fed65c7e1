"""stats.py: hand-computed values, simulations of what the intervals and p-values promise."""

import math

import numpy as np
import pytest
import torch

from evaluation import stats

# ---------------------------------------------------------------- scores


def test_mean_stderr():
    mean, stderr = stats.mean_stderr([1.0, 1.0, 1.0, 0.0, 0.0])
    assert mean == pytest.approx(0.6) and stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert stats.mean_stderr([1.0]) == (1.0, None)
    assert stats.mean_stderr([2.0, 4.0]) == (3.0, 1.0)


def test_subjects_mean_stderr():
    x = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    subjects = ["law", "law", "art", "art", "art", "art"]
    mean, stderr = stats.subjects_mean_stderr(x, subjects)
    assert mean == pytest.approx((0.5 + 0.75) / 2)
    assert stderr == pytest.approx(math.sqrt(0.25 / 1 + 0.75 * 0.25 / 3) / 2)
    # one question each: the spread between the subjects
    assert stats.subjects_mean_stderr([1.0, 0.0, 0.0], ["a", "b", "c"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert stats.subjects_mean_stderr([1.0], ["a"]) == (1.0, None)


def test_subjects_stderr_is_the_spread_of_the_score():
    """By simulation: 3 subjects of different sizes and difficulty."""
    sizes, chances = [20, 5, 10], [0.9, 0.5, 0.2]
    subjects = [s for s, n in enumerate(sizes) for _ in range(n)]
    draws = torch.rand(3000, len(subjects), generator=torch.Generator().manual_seed(0))
    x = (draws < torch.tensor([chances[s] for s in subjects])).double().tolist()
    means, errors = zip(*(stats.subjects_mean_stderr(row, subjects) for row in x), strict=True)
    spread = torch.tensor(means).std().item()
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) == pytest.approx(spread, rel=0.05)


def test_mcnemar():
    def p(only_a, only_b, both=3):
        a = [True] * only_a + [False] * only_b + [True] * both
        b = [False] * only_a + [True] * only_b + [True] * both
        assert stats.mcnemar(a, b) == stats.mcnemar(b, a)
        return stats.mcnemar(a, b)

    assert p(0, 0) == 1.0 and p(5, 5) == 1.0 and p(1, 0) == 1.0
    assert p(0, 5) == pytest.approx(2 / 32)
    assert p(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert p(10, 0) == pytest.approx(2 / 1024)
    assert 0 < p(3000, 3300) < 0.001  # no overflow


def test_ratio_stderr():
    assert stats.ratio_stderr([1, 0, 1], [1, 1, 1]) == pytest.approx(stats.mean_stderr([1, 0, 1]))
    ratio, error = stats.ratio_stderr([1, 3], [2, 3])  # residuals 1 - 1.6 = -0.6 and 3 - 2.4 = 0.6
    assert ratio == 0.8 and error == pytest.approx(math.sqrt(2 * 0.72) / 5)
    assert stats.ratio_stderr([1], [2]) == (0.5, None)


# ---------------------------------------------------------------- pairs


def test_bootstrap_of_a_normal_mean():
    """With many questions the interval is mean +- 1.96 standard errors and p the normal one."""
    d = np.random.default_rng(1).normal(0.1, 1.0, size=400)
    mean, stderr = d.mean(), d.std(ddof=1) / 20
    (low, high), p = stats.bootstrap(list(d))
    assert (low, high) == pytest.approx((mean - 1.96 * stderr, mean + 1.96 * stderr), abs=0.01)
    assert p == pytest.approx(math.erfc(mean / stderr / math.sqrt(2)), abs=0.02)
    assert stats.bootstrap(list(d)) == stats.bootstrap(list(d))  # the seed is fixed
    assert stats.bootstrap([0.0] * 9) == ((0.0, 0.0), 1.0)
    assert stats.bootstrap([0.5] * 9)[1] < 0.001


def test_bootstrap_keeps_the_subjects():
    """Subjects that differ without any spread inside leave no uncertainty in the mean over subjects."""
    (low, high), _ = stats.bootstrap([1.0] * 5 + [0.0] * 20, ["a"] * 5 + ["b"] * 20)
    assert low == high == 0.5
    (low, high), _ = stats.bootstrap([1.0] * 5 + [0.0] * 20)
    assert low < 0.2 < high


def test_the_interval_covers_the_truth():
    """Of 300 simulated comparisons with a true difference of 0.1 about 95% have it in their interval."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(300):
        d = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=150)
        (low, high), _ = stats.bootstrap(list(d), samples=1000)
        covered += low <= 0.1 <= high
    assert 0.91 < covered / 300 < 0.985


def test_compare_chooses_the_test():
    a, b = [True, False, False, False], [True, True, True, False]
    exact = stats.paired_comparison(a, b)
    assert exact["test"] == "McNemar" and exact["p"] == stats.mcnemar(a, b) == 0.5 and exact["difference"] == 0.5
    assert exact["interval"][0] <= 0.5 <= exact["interval"][1]
    assert stats.paired_comparison([0.2, 0.4], [0.3, 0.4])["test"] == "bootstrap"
    over = stats.paired_comparison(a, b, ["x", "y", "y", "y"])
    assert over["test"] == "bootstrap" and over["difference"] == pytest.approx((0 + 2 / 3) / 2)


def test_power():
    """A true difference of POWER standard errors is found at p < 0.05 in four of five repeats."""
    rng = np.random.default_rng(3)
    z = rng.normal(stats.POWER, 1.0, size=20_000)
    assert (abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.01)


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([0.04]) == [0.04] and stats.holm([]) == []
    # when all of 10 differences are noise, hardly more than one in twenty such tables holds a false alarm
    p = np.random.default_rng(4).uniform(size=(2000, 10))
    assert np.mean([min(stats.holm(list(row))) < 0.05 for row in p]) == pytest.approx(0.05, abs=0.015)


# ---------------------------------------------------------------- calibration


def test_calibration():
    # bins (0.2, 0.3] with accuracy 1/2 at confidence 0.28, and (0.9, 1] with accuracy 2/3 at confidence 0.95
    found = stats.calibration([0.26, 0.30, 0.95, 0.95, 0.95], [True, False, True, True, False])
    assert [row["n"] for row in found["bins"]] == [2, 3] and found["bins"][0]["above"] == 0.2
    assert found["ece"] == pytest.approx(2 / 5 * abs(0.5 - 0.28) + 3 / 5 * abs(2 / 3 - 0.95))
    assert stats.calibration([1.0, 1.0], [1, 1])["ece"] == 0 and stats.calibration([0.0], [1])["bins"][0]["above"] == 0


def test_a_calibrated_guesser_has_no_error():
    rng = np.random.default_rng(5)
    confidence = rng.uniform(0.25, 1.0, size=20_000)
    assert stats.calibration(list(confidence), list(rng.uniform(size=20_000) < confidence))["ece"] < 0.02
    assert stats.calibration(list(confidence), list(rng.uniform(size=20_000) < confidence / 2))["ece"] > 0.2


def test_bootstrap_of_subjects_with_one_question_each():
    d = [1.0, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0, 0.0]
    names = [str(i) for i in range(8)]
    assert stats.bootstrap(d, names) == stats.bootstrap(
        d
    )  # not an interval of no width and the smallest p-value there is
    uneven = stats.bootstrap([1.0, 0.0, 0.0, -1.0, 1.0], ["a", "a", "b", "b", "c"])
    assert uneven == stats.bootstrap([0.5, -0.5, 1.0])


def test_a_table_of_figures_is_aligned():
    rows = {"base": {"plain": 0.5, "confidence": 1.0}, "fused": {"plain": 0.25, "confidence": -0.125}}
    assert stats.figure_table("arc", rows).splitlines() == [
        "arc      plain  confidence",
        "base     0.500       1.000",
        "fused    0.250      -0.125",
    ]


# ---------------------------------------------------------------- several seeds


def bernoulli(p, seeds=3, n=400, seed=0):
    return (np.random.default_rng(seed).random((seeds, n)) < p).astype(float)


def test_resampled_means_of_one_seed_have_the_standard_error_of_the_mean():
    x = bernoulli(0.3, seeds=1)
    means = stats.resampled_means(x)
    assert means.mean() == pytest.approx(x.mean(), abs=0.001)
    assert means.std() == pytest.approx(x.std() / math.sqrt(x.size), rel=0.03)


def test_seeds_that_differ_as_a_whole_widen_the_error():
    x = np.repeat([[0.0], [0.5], [1.0]], 400, axis=1)  # no noise of the questions at all
    means = stats.resampled_means(x)
    assert means.std() == pytest.approx(np.std([0, 0.5, 1]) / math.sqrt(3), rel=0.03)
    assert set(np.round(means * 6)) == {0, 1, 2, 3, 4, 5, 6}  # sums of three draws from 0, 1, 2 in sixths


def test_a_difference_is_paired():
    a = bernoulli(0.5)
    b = a.copy()
    b[:, :20] = 1  # the same but for better verdicts on 20 of 400 questions
    found = stats.seeds_difference(a, b)
    gain = (1 - a[:, :20]).sum() / a.size
    assert found["difference"] == pytest.approx(gain) and found["p"] < 0.001
    assert 0 < found["interval"][0] < gain < found["interval"][1] < 0.05
    assert stats.seeds_difference(a, a)["p"] == 1


def test_a_difference_of_one_arm_trained_and_one_not():
    a, b = bernoulli(0.2, seeds=1), bernoulli(0.5, seed=1)
    assert stats.seeds_difference(a, b)["difference"] == pytest.approx(b.mean() - a.mean())


def test_noise_is_seldom_called_a_difference():
    ps = [
        stats.seeds_difference(bernoulli(0.5, n=150, seed=i), bernoulli(0.5, n=150, seed=1000 + i))["p"]
        for i in range(30)
    ]
    assert sum(p < 0.05 for p in ps) <= 5
