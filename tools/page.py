"""One HTML page for a run: results, data, training, replies, fusion, how to repeat it.

    python -m tools.page runs/demo                          # -> runs/demo/page.html
    python -m tools.page runs/a runs/b --out compare.html   # several runs on one page

The page is one file without network access or JavaScript libraries. An unfinished run shows what it has so far.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
import json
import os
import shlex
from html import escape

from core.files import ROOT, InputError, atomic_write, cli
from core.flags import Parser
from core.outputs import check_file
from tools import svg
from tools.run_files import CURVES, RunFiles, read_runs

STEP_NAMES = dict(
    zip(
        "1_collect 2_dedup 3_classify 4_balance 5_respond 6_score 7_label".split(),
        "collect deduplicate classify balance respond score label".split(),
    )
)
MAX_STEPS = 500  # maximum points of a line; longer logs are thinned
MAX_BYTES = 3 * 10**6  # of the page
BUTTONS = '<button class="back">back</button><button class="next">next</button><span class="count"></span>'


def html_table(head: list[str], rows: list[list], sortable: bool = False) -> str:
    """An HTML table. Each cell is a text, or (text, value to sort by)."""
    mark = ' class="sort"' if sortable else ""
    cells = lambda row: "".join(
        f'<td data-value="{c[1]}">{escape(str(c[0]))}</td>' if isinstance(c, tuple) else f"<td>{escape(str(c))}</td>"
        for c in row
    )
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    names = "".join(f"<th{mark}>{escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def json_script(name: str, value: object) -> str:
    """A script element with the value as JSON. "<" is escaped, so no text can close the element."""
    content = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{content}</script>'


def result_section(run: RunFiles) -> str:
    """For each task: a chart of the scores with 95 % intervals, a table, and the significant differences."""
    parts, first = [], next(iter(run.results))
    tasks = list(dict.fromkeys(task for cells in run.results.values() for task in cells))
    for task in tasks:
        cells = {name: cells[task] for name, cells in run.results.items() if task in cells}
        dots, rows, noise = [], [], []
        for name, cell in cells.items():
            score, error, versus = 100 * cell["score"], 100 * (cell.get("stderr") or 0), cell.get("vs_first")
            dots.append((name, score - 1.96 * error, score, score + 1.96 * error))
            difference = p = ("", "")
            if versus:
                low, high = (100 * x for x in versus["interval"])
                difference = (
                    f"{100 * versus['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
                    100 * versus["difference"],
                )
                p = f"{versus['p_holm']:.2g}", versus["p_holm"]
                if versus["p_holm"] >= 0.05:
                    noise.append(name)
            rows.append([name, (f"{score:.1f} ± {error:.1f}", score), difference, p, cell["n"]])
        protocol = next(iter(cells.values())).get("protocol", "")
        base = dots[0][2]
        parts.append(f"<h3>{escape(task)} <span class='small'>({escape(protocol)} protocol)</span></h3>")
        parts.append(svg.dot_chart(f"{task}: score and 95 % interval", dots, base, "percent correct, 95 % interval"))
        parts.append(
            html_table(["checkpoint", "percent ± s.e.", f"difference to {first} (95 %)", "p (Holm)", "n"], rows, True)
        )
        if len(cells) > 1:
            real = [name for name in cells if name != first and name not in noise]
            differ, same = (escape(", ".join(names) or "none") for names in (real, noise))
            parts.append(
                f"<p>Significant against {escape(first)} (p &lt; 0.05): {differ}. Not significant: {same}.</p>"
            )
    return "".join(parts)


def data_section(run: RunFiles) -> str:
    """How many records each step kept, who wrote them, categories before and after balancing, and example pairs."""
    parts = []
    for name, report in run.reports.items():
        steps = report["steps"]
        flow = []
        for step, counts in steps.items():
            dropped = "; ".join(f"{n:,} {why}" for why, n in (counts.get("dropped") or {}).items() if n)
            kept = counts.get("out", f"{counts.get('sft', '')} SFT, {counts.get('kto', '')} KTO")
            flow.append([STEP_NAMES.get(step, step), counts.get("in", ""), kept, dropped])
        parts += [
            f"<h3>{escape(name)}: from collected to trained</h3>",
            html_table(["step", "in", "kept", "dropped"], flow),
        ]
        label, score, balance = (steps.get(key, {}) for key in ("7_label", "6_score", "4_balance"))
        if "best" in label:
            writers = sorted({*label["best"], *label.get("worst", {})})
            checked = score.get("verification", {})
            rate = lambda w: f"{checked[w]['right']} of {checked[w]['checked']}" if w in checked else ""
            rows = [[w, label["best"].get(w, 0), label.get("worst", {}).get(w, 0), rate(w)] for w in writers]
            parts.append("<h3>Who wrote the best and the worst responses</h3>")
            parts.append(html_table(["writer", "best", "worst", "verified right"], rows))
        if "before" in balance:
            before, after = balance["before"], balance.get("after", {})
            rows = [(c, n, after.get(c, 0)) for c, n in sorted(before.items(), key=lambda item: -item[1])[:60]]
            chart = svg.bar_chart("Instructions per category", rows, ("before balancing", "after"))
            parts.append(
                f"<details><summary>Categories before and after balancing ({len(before)})</summary>{chart}</details>"
            )
    if run.pairs:
        parts.append(
            f'<h3>Pairs drawn by seed</h3><div id="pager"><div class="bar">{BUTTONS}</div><div class="item"></div></div>'
        )
        parts.append(json_script("pairs", run.pairs))
    return "".join(parts)


def training_section(run: RunFiles) -> str:
    charts = []
    for key, (title, unit) in CURVES.items():
        series = {}
        for name, records in run.logs.items():
            points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
            if points:
                every = -(-len(points) // MAX_STEPS)
                series[name] = points[::every]
        if series:
            chart = svg.line_chart(title, unit, series, list(run.logs))
            names = svg.legend(list(run.logs), list(series))
            charts.append(f'<div class="chart"><h3>{title}</h3>{names}{chart}<div class="tip"></div></div>')
    return f'<div class="charts">{"".join(charts)}</div>'


def replies_section(run: RunFiles) -> str:
    names = list(dict.fromkeys(name for q in run.questions for name in q["by"]))
    tasks = ["all", *dict.fromkeys(str(q["task"]) for q in run.questions)]
    option = lambda value, chosen: f"<option{' selected' if chosen else ''}>{escape(value)}</option>"
    choose = lambda name, values, at: (
        f'<select id="{name}" aria-label="{name}">{"".join(option(v, i == at) for i, v in enumerate(values))}</select>'
    )
    beside = choose("second", names, min(1, len(names) - 1))
    bar = f'<div class="bar">{choose("first", names, 0)} beside {beside}, task {choose("task", tasks, 0)}, '
    bar += f"right: {choose('who', ['either', 'first', 'second'], 0)} {BUTTONS}</div>"
    return f'<div id="replies-view">{bar}<div class="item"></div></div>{json_script("replies", run.questions)}'


def fusion_section(run: RunFiles) -> str:
    parts = []
    for name, found in run.searches.items():
        at = min(1, len(found["models"]) - 1)
        series = {}  # {kind: (weight, score, standard error) of each point}; shares in percent
        for kind, key in (("tried", "points"), ("final, on held-out data", "final")):
            scaled = [(p, 100 if abs(p["score"]) <= 1 else 1) for p in found.get(key, [])]
            points = [(p["weights"][at], scale * p["score"], scale * p["stderr"]) for p, scale in scaled]
            if points:
                series[kind] = points
        model = os.path.basename(str(found["models"][at]).rstrip("/"))
        parts.append(f"<h3>{escape(name)}: {escape(found['method'])}</h3>")
        parts.append(svg.error_chart("Score over weight", series, f"weight of {model}", f"{found['what']} ± s.e."))
    rows = []
    for name, found in run.merges.items():
        models = ", ".join(f"{m['source']} (weight {m.get('weight')})" for m in found["models"])
        rows.append([name, found.get("method"), models, (found.get("base") or {}).get("source", "")])
    return "".join(parts) + (html_table(["result", "method", "models", "base"], rows) if rows else "")


def commands_section(run: RunFiles) -> str:
    rows = []
    for name, args in run.args.items():
        command = args.get("command")
        line = f"python {shlex.join(map(str, command))}" if command else ""
        steps = [record for record in run.logs.get(name, []) if record.get("tokens_per_second")]
        seconds = sum(record["tokens"] / record["tokens_per_second"] for record in steps)
        data = str(args.get("the data", ""))[:12]
        rows.append([name, line, f"{seconds:.0f} s of steps", args.get("seed", ""), args.get("torch", ""), data])
    return html_table(["run", "command", "time", "seed", "torch", "data's SHA-256"], rows)


SECTIONS = [
    ("Result", "results", result_section),
    ("Data", "reports", data_section),
    ("Training", "logs", training_section),
    ("Replies", "questions", replies_section),
    ("Fusion", "merges", fusion_section),
    ("How to repeat it", "args", commands_section),
]


def page_html(run: RunFiles, title: str) -> str:
    """The HTML page. A section appears if the run has its files."""
    read = lambda name: open(os.path.join(ROOT, "tools", name), encoding="utf-8").read()
    parts = []
    for name, source, section in SECTIONS:
        there = getattr(run, source) or (name == "Data" and run.pairs) or (name == "Fusion" and run.searches)
        if there:
            parts.append(f"<section><h2>{name}</h2>{section(run)}</section>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><style>{read("page.css")}</style></head><body>'
        f"<h1>{escape(title)}</h1>{''.join(parts)}<script>{read('page.js')}</script></body></html>\n"
    )


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders of runs, such as runs/demo")
    p.add_argument("--out", help="HTML file to write (default: page.html in the first run folder)")
    p.add_argument("--seed", type=int, default=0, help="seed for drawing the pairs from kto.jsonl")
    args = p.parse_args()
    out = args.out or os.path.join(args.runs[0], "page.html")
    if os.path.isdir(out):
        raise InputError(f"--out {out}: is a folder; give a file, such as {os.path.join(out, 'page.html')}")
    check_file(out, '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>')
    run = read_runs(args.runs, args.seed)
    title = " and ".join(os.path.basename(os.path.abspath(folder)) for folder in args.runs)
    html = page_html(run, title)
    while len(html.encode()) > MAX_BYTES and run.questions:  # drop replies until the page fits
        run.questions = run.questions[: len(run.questions) // 2]
        html = page_html(run, title)
    with atomic_write(out) as f:
        f.write(html)
    print(f"wrote {out} ({len(html.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    cli(main)
