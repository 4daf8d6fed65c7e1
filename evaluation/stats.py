"""Statistics on verdicts: scores with standard errors, paired tests, what is noise, calibration. Knows no benchmark.

A verdict is a number between 0 and 1, one a question; two checkpoints are compared on the same questions.
"""

import collections
import math

import numpy as np

POWER = 1.96 + 0.8416  # standard errors that a true difference must have to show at p < 0.05 in four of five repeats

# ---------------------------------------------------------------- scores


def mean_stderr(x):
    """Mean of n numbers and its standard error sqrt(s^2 / n), s^2 the sample variance (for 0/1: sqrt(p(1-p)/(n-1))).

    The standard error of a single number is not known: None.
    """
    n = len(x)
    mean = sum(x) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in x) / (n - 1) / n) if n > 1 else None


def subjects_mean_stderr(x, subjects):
    """Mean over subjects of the subjects' means, and its standard error. x, subjects: n numbers and n names.

    The subjects are those of the benchmark, not a sample: only the questions vary, so the S subjects' squared errors
    add up, sqrt(sum_s se_s^2) / S. Where a subject has one question and so no se_s, the spread of the subjects' means
    stands in, sqrt(s^2 / S): too large rather than too small, as it also holds how much the subjects differ.
    """
    means, errors = zip(*(mean_stderr(group) for group in by_subject(x, subjects)))
    if None in errors:
        return mean_stderr(means)
    return sum(means) / len(means), math.sqrt(sum(e * e for e in errors)) / len(means)


def by_subject(x, subjects):
    groups = collections.defaultdict(list)
    for value, subject in zip(x, subjects, strict=True):
        groups[subject].append(value)
    return list(groups.values())


def ratio_stderr(numerators, denominators):
    """sum(numerators) / sum(denominators) over n questions and its standard error, the questions being what varies.

    By linearisation: sqrt(n / (n - 1) sum (a_i - r b_i)^2) / sum b, Cochran, Sampling Techniques, section 6.4.
    """
    n, total = len(numerators), sum(denominators)
    ratio = sum(numerators) / total
    rest = sum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return ratio, math.sqrt(n / (n - 1) * rest) / total if n > 1 else None


# ---------------------------------------------------------------- two checkpoints on the same questions


def mcnemar(a, b):
    """Exact two-sided McNemar p-value of two lists of verdicts on the same questions.

    Under the null each of the n discordant questions falls to either side with probability 1/2:
    p = min(1, 2 P[Binomial(n, 1/2) <= the smaller side]).
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, term, total = only_a + only_b, 1, 0
    for i in range(min(only_a, only_b) + 1):  # exact integers: n may be thousands
        total += term  # term = C(n, i)
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def bootstrap(differences, subjects=None, samples=10_000, seed=0):
    """Paired bootstrap of a mean difference: ((low, high), p), the 95% percentile interval and a two-sided p-value.

    differences: n numbers, one a question. subjects: n names; the mean is then that of the subjects' means, and each
    subject is resampled by itself; where one has a single question, which resampling cannot vary, the subjects' means are
    resampled instead. p: how often a resampled mean lies as far from the observed one as zero does.
    """
    groups = by_subject(differences, subjects) if subjects else [differences]
    if subjects and min(map(len, groups)) == 1:
        groups = [[sum(group) / len(group) for group in groups]]
    rng, means = np.random.default_rng(seed), np.zeros(samples)
    for group in groups:
        values, counts = np.unique(np.asarray(group, dtype=float), return_counts=True)
        # n draws with replacement, as counts of the distinct values: for 0/1 verdicts there are but three
        drawn = rng.multinomial(len(group), counts / len(group), size=samples)  # (samples, values)
        means += drawn @ values / len(group) / len(groups)
    observed = sum(sum(group) / len(group) for group in groups) / len(groups)
    as_far = np.count_nonzero(abs(means - observed) >= abs(observed) - 1e-12)
    low, high = np.quantile(means, [0.025, 0.975])
    return (float(low), float(high)), (1 + as_far) / (1 + samples)


def paired_comparison(a, b, subjects=None):
    """The paired difference b - a of two lists of verdicts: {"difference", "stderr", "interval", "p", "test"}.

    subjects: n names when the score averages over them. 0/1 verdicts averaged over questions are tested by McNemar's
    exact test, any others by the paired bootstrap, which also gives the 95% interval.
    """
    d = [float(y) - float(x) for x, y in zip(a, b, strict=True)]
    difference, stderr = subjects_mean_stderr(d, subjects) if subjects else mean_stderr(d)
    interval, p = bootstrap(d, subjects)
    exact = not subjects and {*a, *b} <= {0, 1}
    return {"difference": difference, "stderr": stderr, "interval": interval, "p": mcnemar(a, b) if exact else p,
            "test": "McNemar" if exact else "bootstrap"}  # fmt: skip


def holm(p_values):
    """Holm's step-down correction (Scand. J. Stat. 6, 1979): the chance of any false alarm stays below the level.

    The i-th smallest of m p-values is multiplied by m - i (i from 0), no corrected one below a smaller one's.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for i, k in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[k] * (len(p_values) - i)))
        corrected[k] = highest
    return corrected


# ---------------------------------------------------------------- calibration


def calibration(confidences, verdicts, bins=10):
    """Expected calibration error (arXiv 1706.04599) and its reliability table.

    confidences: n probabilities of the chosen answer. verdicts: n, whether it was right. Bins of equal width, (low,
    high]; the error is the mean over questions of |accuracy - mean confidence| of the question's bin.
    """
    places = [min(bins - 1, max(0, math.ceil(c * bins) - 1)) for c in confidences]
    table, error = [], 0.0
    for k in range(bins):
        inside = [i for i, place in enumerate(places) if place == k]
        if inside:
            confidence = sum(confidences[i] for i in inside) / len(inside)
            accuracy = sum(verdicts[i] for i in inside) / len(inside)
            error += abs(accuracy - confidence) * len(inside) / len(places)
            table.append({"above": k / bins, "to": (k + 1) / bins, "n": len(inside), "confidence": confidence,
                          "accuracy": accuracy})  # fmt: skip
    return {"ece": error, "bins": table}
