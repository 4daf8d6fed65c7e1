"""Draws training curves, data categories, scores or a merge search as PNG. Needs matplotlib (requirements-dev.txt).

    python -m tools.plot runs/demo/sft runs/demo/sft-kto --out curves.png          # one line per run
    python -m tools.plot data/report.json --out categories.png             # categories before and after balancing
    python -m tools.plot runs/demo/eval/results.json --out scores.png              # eval.py: scores with intervals
    python -m tools.plot search.json --out weight.png                              # merge.py search: score over weight

A training run is its checkpoint, its OUT.run/ or its log.jsonl.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
import collections
import json
import os
from types import ModuleType
from typing import TYPE_CHECKING

from core.files import InputError, atomic_write, cli
from core.flags import Parser, at_least, file_out
from core.records import read_jsonl
from tools.run_files import CURVES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARK = "tools.plot of slm-post-training"  # stored in each PNG; a PNG without it is not replaced
DASHED = {"loss": "eval_loss", "rewards/chosen": "rewards/rejected"}  # {key: the key drawn dashed in its panel}


def read_steps(source: str) -> tuple[str, list[dict]]:
    """The name of a training run and its log, one record per step."""
    name = source.rstrip("/").removesuffix("/log.jsonl").removesuffix(".run")
    path = source if source.endswith(".jsonl") else f"{name}.run/log.jsonl"
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; give a checkpoint that train_sft.py or train_kto.py wrote")
    records = [record for _, record in read_jsonl(path)]
    if not records:
        raise InputError(f"{path}: holds no step yet")
    return os.path.basename(name), records


def smooth(values: list[float], window: int) -> list[float]:
    """Running mean over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def draw_runs(
    plt: ModuleType, runs: list[tuple[str, list[dict]]], window: int, chosen: list[str] | None = None
) -> "Figure":
    """One panel for each quantity that a run logged. chosen: draw only the panels with one of these keys."""
    logged = {key for _, records in runs for record in records for key in record}
    wanted = logged & {*chosen} if chosen else logged
    panels = [[key, DASHED[key]] if key in DASHED else [key] for key in CURVES if key not in DASHED.values()]
    panels = [keys for keys in panels if wanted & {*keys}]
    if not panels:
        raise InputError(f"--keys {' '.join(chosen or [])}: no run logged a key that is drawn")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for axis, keys in zip(axes.flat, panels):
        for number, (name, records) in enumerate(runs):
            for style, key in zip(("-", "--"), keys):
                points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                if points:
                    steps, values = zip(*points)
                    look = {"color": f"C{number % 10}", "lw": 1.2, "marker": "o" if len(points) < 3 else None}
                    label = name if key == keys[0] else None
                    axis.plot(steps, smooth(values, window), style, label=label, **look)
        axis.set_title("; dashed: ".join(CURVES[key][0] for key in keys), fontsize=10)
        axis.set_ylabel(CURVES[keys[0]][1], fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes[0, 0].legend(fontsize=8)
    return figure


def draw_results(plt: ModuleType, results: dict) -> "Figure":
    """One panel per task: each checkpoint's score with its 95 % interval, and a line at the first one's score."""
    tasks = list(dict.fromkeys(task for cells in results.values() for task in cells))
    size = (4.2 * len(tasks) + 1.5, 0.9 + 0.34 * len(results))
    figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, task in zip(axes[0], tasks):
        cells = {name: found[task] for name, found in results.items() if task in found}
        scores = [100 * cell["score"] for cell in cells.values()]
        errors = [196 * (cell["stderr"] or 0) for cell in cells.values()]
        axis.errorbar(scores, list(cells), xerr=errors, fmt="o", color="C0", capsize=3)
        axis.axvline(scores[0], color="0.5", ls=":")
        first = next(iter(cells.values()))
        axis.set_xlabel(f"{task}: percent correct, 95 % interval (n = {first['n']})", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    return figure


def draw_categories(plt: ModuleType, report: dict, most: int = 40) -> "Figure":
    """Instructions per secondary category before and after balancing, from make_data.py's report.json."""
    before, after = (report["steps"]["4_balance"][k] for k in ("before", "after"))
    names = sorted(before, key=lambda name: -before[name])[:most]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.22 * len(names)), layout="constrained")
    axis.barh(names, [before[n] for n in names], color="0.8", label="before")
    axis.barh(names, [after.get(n, 0) for n in names], height=0.45, color="C0", label="after")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    effective = [f"{report['diversity'][k]['effective categories']:.1f}" for k in ("before", "after")]
    more = f"; {len(before) - most} smaller ones not shown" if len(before) > most else ""
    title = f"instructions per category: as even as {effective[0]} equal ones before, {effective[1]} after{more}"
    axis.set_title(title, fontsize=9)
    axis.legend()
    return figure


def draw_search(plt: ModuleType, found: dict) -> "Figure":
    """One panel for each number that merge.py search varied: all points tried, and the final scores.

    A line joins points that differ only in that number. The line through the best point is coloured.
    """
    points, final, models = found["points"], found["final"], found["models"]

    def numbers(p):
        weights = {
            f"weight of model {i + 1}, {os.path.basename(m.rstrip('/'))}": p["weights"][i] for i, m in enumerate(models)
        }
        if len(models) > 1:
            del weights[next(iter(weights))]  # the first model's follows from the others
        return weights | {k: p[k] for k in ("density", "lambda", "lines") if p.get(k) is not None}

    best = numbers(found["best"])
    lines = [k for k in best if len({numbers(p)[k] for p in points}) > 1] or list(best)
    figure, axes = plt.subplots(
        1, len(lines), figsize=(5.2 * len(lines), 4), squeeze=False, sharey=True, layout="constrained"
    )

    def draw(axis, k, points, label, **style):
        if points:
            x, y, error = zip(*sorted((numbers(p)[k], p["score"], p["stderr"]) for p in points))
            axis.errorbar(x, y, error, label=label, capsize=2, lw=1, **style)

    for axis, k in zip(axes[0], lines):
        others = [o for o in best if o != k and not (o.startswith("weight") and k.startswith("weight"))]
        groups = collections.defaultdict(list)  # {values of the other numbers: points of a line}
        for p in points:
            groups[tuple(round(numbers(p)[o], 9) for o in others)].append(p)
        through = groups.pop(tuple(round(best[o], 9) for o in others), [])
        for group in groups.values():
            draw(axis, k, group, "other lines", fmt="o-", ms=4, color="0.75")
        draw(axis, k, through, "tried", fmt="o-", ms=4, color="C0")
        draw(axis, k, final, "final, on data set aside", fmt="D", ms=6, color="C3", mfc="none")
        axis.axvline(best[k], color="0.5", ls=":", label="the best")
        axis.set_xlabel({"lines": "LiNeS alpha"}.get(k, k))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"{found['what']} ± one standard error")
    legend = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    axes[0, -1].legend(legend.values(), legend, fontsize=8)
    figure.suptitle(f"{found['method']}, {len(points)} points", fontsize=10)
    return figure


def import_pyplot() -> ModuleType:
    """matplotlib.pyplot, without a window; InputError where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("tools.plot needs matplotlib: pip install -r requirements-dev.txt") from None
    return plt


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument(
        "sources", nargs="+", metavar="RUN", help="training runs, or one file: results.json, report.json or search.json"
    )
    p.add_argument("--out", type=file_out(MARK), default="plot.png", help="PNG file to write")
    p.add_argument("--smooth", type=at_least(1), default=1, help="steps in the running mean of each curve")
    p.add_argument(
        "--keys", nargs="+", choices=CURVES, metavar="KEY", help="draw only the panels with these keys of log.jsonl"
    )
    args = p.parse_args()
    plt, first = import_pyplot(), args.sources[0]
    if first.endswith(".json"):
        try:
            with open(first, encoding="utf-8") as f:
                content = json.load(f)
            draw = draw_search if "points" in content else draw_categories if "steps" in content else draw_results
            figure = draw(plt, content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as e:
            what = "not a results.json, a report.json, or the result of merge.py search"
            raise InputError(f"{first}: {what} ({type(e).__name__}: {e})") from None
    else:
        figure = draw_runs(plt, [read_steps(source) for source in args.sources], args.smooth, args.keys)
    with atomic_write(args.out, "wb") as f:
        figure.savefig(f, dpi=130, format="png", metadata={"Software": MARK})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
