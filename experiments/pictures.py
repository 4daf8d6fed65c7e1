"""The pictures of docs/REPORT.md as SVG files, drawn with tools.svg from a study's result file."""

import re

from experiments.tables import NAMES, OTHER_RATES, interval
from tools import svg

CURVES = [
    ("rewards/chosen", "reward of desirable responses, beta x nats"),
    ("rewards/rejected", "reward of undesirable responses, beta x nats"),
    ("rewards/margins", "reward margin, beta x nats"),
    ("kl", "z0, the KL estimate, nats"),
]
SMOOTH = 5  # steps of a running mean
STYLE = "<style>text{font-family:system-ui,sans-serif;fill:#111}.grid{stroke:#ccc}</style>"
WRITERS = {  # (rows of the data's "followed" and "own_data", name)
    "teacher": ("data", ["teacher"]),
    "student, greedy": ("data", ["small"]),
    "student, sampled": ("data", ["small-2", "small-3", "small-4"]),
    "SFT, greedy": ("own_data", ["small"]),
    "SFT, sampled": ("own_data", ["small-2", "small-3", "small-4"]),
}


def picture(rows: list[list[str]]) -> str:
    """Rows of <svg> elements as one SVG file, with a white background and a style of its own."""
    parts, width, top = [], 0.0, 10.0
    for row in rows:
        left, height = 10.0, 0.0
        for element in row:
            w, h = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', element).groups())
            place = f'<svg x="{left:.0f}" y="{top:.0f}" width="{w:.0f}" height="{h:.0f}" '
            opening, rest = element.split("<title>", 1)
            opening = re.sub(r' (data-chart|style|class)="[^"]*"', "", opening)  # for a page's script and style sheet
            parts.append(f"{opening.replace('<svg ', place, 1)}<title>{rest}")
            left, height = left + w + 10, max(height, h)
        width, top = max(width, left), top + height + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {top:.0f}" width="{width:.0f}" height="{top:.0f}">'
    white = f'<rect width="{width:.0f}" height="{top:.0f}" fill="#fff"/>'
    return f"{head}{STYLE}{white}{''.join(parts)}</svg>\n".replace("><", ">\n<")


def scores_picture(verdicts: dict[str, str]) -> str:
    """A dot with its 95 % interval for each arm, the paper's first. Losses are shown at one learning rate."""
    other_rates = {f"{loss}-{rate}" for loss, rate in OTHER_RATES}
    arms = [arm for arm in NAMES if arm in verdicts and arm not in other_rates]
    rows = [(NAMES[arm], *interval(verdicts[arm])) for arm in arms]
    base = rows[0][2]  # the base, or the first arm that there is
    return picture([[svg.dot_chart("Score by arm", rows, base, "instructions followed, %, with 95 % interval")]])


def general_picture(verdicts: dict[str, dict[str, str]]) -> str:
    """Scores of the arms with general instructions: a chart for GSM8K, one for the test instructions.

    verdicts: {benchmark: {arm: verdicts}}.
    """
    charts = []
    for task in ("GSM8K", "the test instructions"):
        arms = [arm for arm in NAMES if arm in verdicts.get(task, {}) and (arm == "base" or arm.startswith("general-"))]
        if len(arms) > 1:
            rows = [(NAMES[arm], *interval(verdicts[task][arm])) for arm in arms]
            charts.append([svg.dot_chart(task, rows, rows[0][2], f"{task}: right, %, with 95 % interval")])
    return picture(charts) if charts else ""


def running_mean(values: list[float], size: int = SMOOTH) -> list[tuple[float, float]]:
    """-> (step, mean of the last `size` values)."""
    return [(i + 1, sum(values[max(0, i + 1 - size) : i + 1]) / min(size, i + 1)) for i in range(len(values))]


def kto_picture(curves: dict[str, dict[str, list[float]]]) -> str:
    """Rewards and KL of the KTO arms over training steps."""
    names = [arm for arm in ("kto", "sft-kto", "sft-kto-own", "kto-no-z0") if "kl" in curves.get(arm, {})]
    charts = []
    for key, unit in CURVES:
        series = {NAMES[arm]: running_mean(curves[arm][key]) for arm in names if curves[arm].get(key)}
        if series:
            charts.append(svg.line_chart(unit, unit, series, [NAMES[arm] for arm in names]))
    if not charts:
        return ""
    return picture([[svg.legend([NAMES[arm] for arm in names])], charts[:2], charts[2:]])


def fusion_picture(verdicts: dict[str, str]) -> str:
    """Score over the weight of SFT-KTO in its fusion with SFT."""
    points = []
    for weight, arm in ((0.0, "sft"), (0.5, "mean"), (0.95, "mean-05-95"), (1.0, "sft-kto")):
        if arm in verdicts:
            low, mean, high = interval(verdicts[arm])
            points.append((weight, mean, (high - low) / 2))
    if len(points) < 2:
        return ""
    series = {"score with 95 % interval": points}
    x_label = "weight of SFT-KTO in its fusion with SFT (0: SFT alone)"
    chart = svg.error_chart("Score over fusion weight", series, x_label, "instructions followed, %")
    return picture([[chart[chart.index("<svg", 1) :]]])  # without its legend: there is one line


def followed_picture(result: dict) -> str:
    """The share of the training instructions' responses that follow all constraints, by writer."""
    rows = []
    for name, (data, writers) in WRITERS.items():
        tallies = [result.get(data, {}).get("followed", {}).get(writer, [0, 0]) for writer in writers]
        right, n = (sum(tally[i] for tally in tallies) for i in (0, 1))
        if n:
            rows.append((f"{name} (n = {n})", *interval("1" * right + "0" * (n - right))))
    if not rows:
        return ""
    base = next((row[2] for row in rows if row[0].startswith("student, greedy")), rows[0][2])
    return picture([[svg.dot_chart("Share that follows", rows, base, "responses that follow all constraints, %")]])


def pictures(result: dict, verdicts: dict[str, str]) -> dict[str, str]:
    """{file name: SVG text} of all pictures that the results suffice for. verdicts: of the test split, by arm."""
    drawn = {
        "report-scores.svg": scores_picture(verdicts) if verdicts else "",
        "report-kto.svg": kto_picture(result.get("curves", {})),
        "report-fusion.svg": fusion_picture(verdicts),
        "report-followed.svg": followed_picture(result),
    }
    return {name: text for name, text in drawn.items() if text}
