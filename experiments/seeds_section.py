"""The parts of docs/REPORT.md on other seeds, and on the learning rates of other losses."""

import re

import numpy as np

from evaluation.stats import seeds_difference
from experiments.tables import LOSS_NAMES, NAMES, RATE_NAMES, TableRow, markdown_table, points, split_verdicts


def seeds_of(arm: str, verdicts: dict[str, str]) -> dict[int, list[int]]:
    """{seed: verdicts} of an arm. verdicts: of ARM, which is seed 0, and of ARM-seed-N."""
    found = {0: verdicts[arm]} if arm in verdicts else {}
    for name, right in verdicts.items():
        if match := re.fullmatch(rf"{re.escape(arm)}-seed-(\d+)", name):
            found[int(match[1])] = right
    return {seed: [int(digit) for digit in found[seed]] for seed in sorted(found)}


def compare_seeds(row: TableRow, verdicts: dict[str, str]) -> tuple[dict[int, float], dict] | None:
    """-> ({seed: difference to the baseline}, seeds_difference of all), None with fewer than two common seeds."""
    arm, baseline = seeds_of(row.arm, verdicts), seeds_of(row.baseline, verdicts)
    if row.baseline == "base":
        baseline = {seed: baseline[0] for seed in arm}  # it was not trained, so it has no seed
    seeds = sorted(arm.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    first, second = (np.array([some[seed] for seed in seeds], dtype=float) for some in (baseline, arm))  # (S, n)
    return dict(zip(seeds, (second - first).mean(1).tolist())), seeds_difference(first, second)


def seeds_text(row: TableRow, verdicts: dict[str, str]) -> str:
    """The differences of all seeds, as a part of a sentence. Empty with a single seed."""
    if not (found := compare_seeds(row, verdicts)):
        return ""
    return f"; seeds {', '.join(map(str, found[0]))}: {', '.join(map(points, found[0].values()))}"


def seeds_table(rows: list[TableRow], verdicts: dict[str, str]) -> str:
    """A subsection with the arms that ran with several seeds. Empty if none did."""
    arms = {arm: by for arm in dict.fromkeys(row.arm for row in rows) if len(by := seeds_of(arm, verdicts)) > 1}
    if not any(row.arm in arms and row.baseline for row in rows):
        return ""
    seeds = sorted({seed for by in arms.values() for seed in by})
    lines = []
    for row in (row for row in rows if row.arm in arms):
        shares = {seed: 100 * sum(right) / len(right) for seed, right in arms[row.arm].items()}
        cells = [f"{shares[seed]:.1f}" if seed in shares else "" for seed in seeds]
        line = [NAMES[row.arm], *cells, f"{sum(shares.values()) / len(shares):.1f}"]
        if found := compare_seeds(row, verdicts):
            by_seed, all_seeds = found
            low, high = all_seeds["interval"]
            difference = f"{points(all_seeds['difference'])} [{points(low)}, {points(high)}]"
            line += [NAMES[row.baseline], difference, ", ".join(map(points, by_seed.values()))]
        lines.append(line + [""] * (len(seeds) + 5 - len(line)))
    head = ["arm", *(f"seed {seed}, %" for seed in seeds), "mean, %", "compared with"]
    head += ["mean difference, points", "difference of each seed"]
    return f"""### Other seeds

The seed decides the order of the examples; data and learning rates stay the same. The interval of a mean difference
resamples seeds and questions at once, which makes it rather too wide.

{markdown_table(head, lines)}
"""


def loss_rates_table(result: dict) -> str:
    """Dev scores of the losses by learning rate, the best in bold. Empty without any."""
    dev, lines = split_verdicts(result, "dev"), []
    for arm, name in LOSS_NAMES.items():
        found = {rate: dev.get(f"{arm}-{rate}" if rate else arm) for rate in ("half", "", "2x")}
        shares = {rate: 100 * right.count("1") / len(right) for rate, right in found.items() if right}
        if shares:
            best = max(shares.values())
            texts = {rate: f"**{x:.1f}**" if x == best else f"{x:.1f}" for rate, x in shares.items()}
            lines.append([name, *(texts.get(rate, "") for rate in found)])
    if not lines:
        return ""
    head = ["dev score, %", *(f"{RATE_NAMES[rate]} the rate" if rate else "same rate" for rate in ("half", "", "2x"))]
    return f"The best rate of each loss on the dev split is bold:\n\n{markdown_table(head, lines)}\n"
