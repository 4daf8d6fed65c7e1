"""Statistics of verdicts: means with standard errors, paired tests, correction for many tests, calibration.

A verdict is a number between 0 and 1 for one question. Two checkpoints are compared on the same questions.
"""

import collections
import functools
import math

import numpy as np

POWER = 1.96 + 0.8416  # a true difference of this many standard errors has p < 0.05 with probability 0.8

# ---------------------------------------------------------------------------------------------------------------------
# Scores


def mean_stderr(x: list[float]) -> tuple[float, float | None]:
    """Mean of n numbers and its standard error sqrt(s^2 / n), with the sample variance s^2. None if n is 1."""
    n = len(x)
    mean = sum(x) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in x) / (n - 1) / n) if n > 1 else None


def subjects_mean_stderr(x: list[float], subjects: list[str]) -> tuple[float, float | None]:
    """Mean of the subjects' means and its standard error. x, subjects: n numbers and n names.

    The subjects are fixed and only the questions vary, so the error is sqrt(sum_s se_s^2) / S over the S subjects. If a
    subject has a single question, its se_s is unknown. The error is then that of the subjects' means, sqrt(s^2 / S). It
    tends to be too large, because it includes the differences between subjects.
    """
    means, errors = zip(*(mean_stderr(group) for group in by_subject(x, subjects)))
    if None in errors:
        return mean_stderr(means)
    return sum(means) / len(means), math.sqrt(sum(e * e for e in errors)) / len(means)


def by_subject(x: list[float], subjects: list[str]) -> list[list[float]]:
    groups = collections.defaultdict(list)
    for value, subject in zip(x, subjects, strict=True):
        groups[subject].append(value)
    return list(groups.values())


def ratio_stderr(numerators: list[float], denominators: list[float]) -> tuple[float, float | None]:
    """r = sum(a) / sum(b) over n questions (a: numerators, b: denominators), and its standard error by linearisation.

    The error is sqrt(n / (n - 1) sum (a_i - r b_i)^2) / sum b: Cochran, Sampling Techniques, section 6.4.
    """
    n, total = len(numerators), sum(denominators)
    ratio = sum(numerators) / total
    rest = sum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return ratio, math.sqrt(n / (n - 1) * rest) / total if n > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Two checkpoints on the same questions


def mcnemar(first: list, second: list) -> float:
    """Exact two-sided p-value of McNemar's test. first, second: verdicts 0 or 1 on the same questions.

    Under the null, each of the n questions on which they differ falls to either side with probability 1/2:
    p = min(1, 2 P[Binomial(n, 1/2) <= smaller side]).
    """
    only_first = sum(x and not y for x, y in zip(first, second, strict=True))
    only_second = sum(y and not x for x, y in zip(first, second, strict=True))
    n, term, total = only_first + only_second, 1, 0
    for i in range(min(only_first, only_second) + 1):  # exact integers: n may be thousands
        total += term  # term = C(n, i)
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def bootstrap(
    differences: list[float], subjects: list[str] | None = None, samples: int = 10_000, seed: int = 0
) -> tuple[tuple[float, float], float]:
    """Paired bootstrap of a mean difference: the 95% percentile interval, and a two-sided p-value.

    differences: one number per question. subjects: one name per question. With subjects, the mean is over the subjects'
    means, and each subject is resampled by itself. If a subject has a single question, the means are resampled
    instead. p: how often a resampled mean is as far from the observed one as zero is.
    """
    groups = by_subject(differences, subjects) if subjects else [differences]
    if subjects and min(map(len, groups)) == 1:
        groups = [[sum(group) / len(group) for group in groups]]
    rng, means = np.random.default_rng(seed), np.zeros(samples)
    for group in groups:
        values, counts = np.unique(np.asarray(group, dtype=float), return_counts=True)
        # n draws with replacement, as counts of the distinct values (three for 0/1 verdicts)
        drawn = rng.multinomial(len(group), counts / len(group), size=samples)  # (samples, values)
        means += drawn @ values / len(group) / len(groups)
    observed = sum(sum(group) / len(group) for group in groups) / len(groups)
    as_far = np.count_nonzero(abs(means - observed) >= abs(observed) - 1e-12)
    low, high = np.quantile(means, [0.025, 0.975])
    return (float(low), float(high)), (1 + as_far) / (1 + samples)


def paired_comparison(first: list, second: list, subjects: list[str] | None = None) -> dict:
    """The paired difference of verdicts, second - first: {"difference", "stderr", "interval", "p", "test"}.

    subjects: one name per question, if the score averages over subjects. The test is McNemar's exact test for 0/1
    verdicts averaged over questions, else the paired bootstrap. The 95% interval is always the bootstrap's.
    """
    differences = [float(y) - float(x) for x, y in zip(first, second, strict=True)]
    difference, stderr = subjects_mean_stderr(differences, subjects) if subjects else mean_stderr(differences)
    interval, p = bootstrap(differences, subjects)
    exact = not subjects and {*first, *second} <= {0, 1}
    p, test = (mcnemar(first, second), "McNemar") if exact else (p, "bootstrap")
    return {"difference": difference, "stderr": stderr, "interval": interval, "p": p, "test": test}


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction (Scand. J. Stat. 6, 1979): bounds the chance of any false alarm.

    The i-th smallest of m p-values (i from 0) is multiplied by m - i; corrected values never decrease.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for i, k in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[k] * (len(p_values) - i)))
        corrected[k] = highest
    return corrected


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds


@functools.lru_cache
def draw_weights(n_seeds: int, n: int, draws: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each question is drawn: (draws, n_seeds) and (draws, n), as shares that add up to 1."""
    rng = np.random.default_rng(0)
    return tuple(rng.multinomial(k, np.full(k, 1 / k), size=draws) / k for k in (n_seeds, n))


def resampled_means(x: np.ndarray) -> np.ndarray:
    """Means of x (S seeds, n questions), both resampled with replacement -> (draws,).

    The pigeonhole bootstrap (Owen, Ann. Appl. Stat. 1, 2007). It counts the noise of single verdicts up to three times,
    so its errors and intervals tend to be too wide.
    """
    seeds, questions = draw_weights(*x.shape)
    return ((seeds @ x) * questions).sum(1)


def seeds_difference(a: np.ndarray, b: np.ndarray) -> dict:
    """b - a, each (S, n) verdicts on the same questions -> {"difference", "interval", "p"}.

    Seeds are paired if both have equally many. A baseline that was not trained has one. p is two-sided.
    """
    d = b - a
    means, observed = resampled_means(d), d.mean()
    p = (1 + np.count_nonzero(abs(means - observed) >= abs(observed) - 1e-12)) / (1 + len(means))
    return {"difference": observed, "interval": np.quantile(means, [0.025, 0.975]), "p": p}


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def calibration(confidences: list[float], verdicts: list[float], bins: int = 10) -> dict:
    """Expected calibration error (arXiv 1706.04599) and its reliability table.

    confidences: the probability of each chosen answer. verdicts: whether it was right. The bins (low, high] have equal
    width. The error is the mean over questions of |accuracy - mean confidence| of the question's bin.
    """
    bin_of = [min(bins - 1, max(0, math.ceil(c * bins) - 1)) for c in confidences]
    table, error = [], 0.0
    for k in range(bins):
        inside = [i for i, own in enumerate(bin_of) if own == k]
        if inside:
            confidence = sum(confidences[i] for i in inside) / len(inside)
            accuracy = sum(verdicts[i] for i in inside) / len(inside)
            error += abs(accuracy - confidence) * len(inside) / len(bin_of)
            row = {"above": k / bins, "to": (k + 1) / bins, "n": len(inside)}
            table.append(row | {"confidence": confidence, "accuracy": accuracy})
    return {"ece": error, "bins": table}


# ---------------------------------------------------------------------------------------------------------------------
# Text


def figure_table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """Aligned lines: the title and the names of the columns, then each row. rows: {name: {column: figure}}."""
    columns = {column: max(8, len(column) + 2) for figures in rows.values() for column in figures}  # {name: width}
    width = max(map(len, (title, *rows))) + 1
    lines = [f"{title:{width}}" + "".join(f"{column:>{n}}" for column, n in columns.items())]
    lines += [f"{name:{width}}" + "".join(f"{x[c]:{n}.3f}" for c, n in columns.items()) for name, x in rows.items()]
    return "\n".join(lines)
