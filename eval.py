"""Benchmarks of checkpoints, with standard errors and paired tests: one table for all checkpoints given.

    python eval.py --ckpt Qwen/Qwen2-0.5B-Instruct sft.pt --tasks gsm8k mmlu --limit 200 --out runs/eval
    python eval.py compare Qwen2-0.5B-Instruct sft --out runs/eval       # the questions on which two of them differ

--protocol paper: greedy chat replies, read as the paper's scripts read them. --protocol loglik: the likeliest of the
choices, as lm-evaluation-harness asks it. A score belongs to its protocol; the two never share a column.
OUT/replies.jsonl grows with each reply: a run that is started again only asks what is missing, --rescore reads the
replies again without the model, and torchrun spreads the questions over its ranks.
"""

import collections
import itertools
import json
import math
import os
import sys

from tqdm import tqdm

from core.checkpoint import Checkpoint
from core.distributed import join_group, leave_group, own_device
from core.files import InputError, atomic_write, cli
from core.flags import Parser
from core.records import read_jsonl, write_jsonl
from core.tokenizer import Tokenizer
from evaluation import judge
from evaluation.benchmarks import BENCHMARKS, prepare, read
from evaluation.replies import add_reply_flags, checkpoint_names, collect_replies, load_replies, protocol_name
from evaluation.stats import (
    POWER,
    calibration,
    holm,
    mean_stderr,
    paired_comparison,
    ratio_stderr,
    subjects_mean_stderr,
)

# ---------------------------------------------------------------- summing up


def average_metric(values):
    """Values of a metric, one a question: numbers, lists (several verdicts a question) or (numerator, denominator)."""
    pairs = [v if isinstance(v, tuple) else (sum(v), len(v)) if isinstance(v, list) else (v, 1) for v in values]
    score, stderr = ratio_stderr(*zip(*pairs))
    return {"score": score, "stderr": stderr}


def summarise_task(verdicts, subjects, over, first=None):
    """Score, standard error, n; against the first checkpoint's verdicts also the paired comparison."""
    subjects = subjects if over == "subjects" else None
    x = [float(v) for v in verdicts]
    score, stderr = subjects_mean_stderr(x, subjects) if subjects else mean_stderr(x)
    cell = {"score": score, "stderr": stderr, "n": len(verdicts)}
    if first is not None:
        cell["vs_first"] = paired_comparison(first, verdicts, subjects)
    return cell


def score_replies(names, work, said, protocol):
    """What was said -> (the content of results.json, the lines of samples.jsonl)."""
    results, samples = {name: {} for name in names}, []
    first = {}  # the first checkpoint's verdicts on each task
    for name, (task, questions) in itertools.product(names, work.items()):
        records = said[name][task]
        bar = tqdm(records, f"{name} {task}: verdicts", disable=None, leave=False)
        found = [read(q, record) for record, q in zip(bar, questions)]  # anew for earlier replies too: reading is cheap
        extracted, verdicts, metrics, confidences = zip(*found)
        for q, record, text, correct in zip(questions, records, extracted, verdicts):
            kept = {k: v for k, v in record.items() if k not in ("key", "checkpoint", "task", "id", "code")}
            samples.append(
                {
                    "checkpoint": name,
                    "task": task,
                    "id": q["row"]["id"],
                    "prompt": q["messages"],
                    **kept,
                    "extracted": text,
                    "correct": correct,
                    "protocol": protocol,
                }
            )
        subjects = [q["row"].get("subject") for q in questions]
        cell = summarise_task(verdicts, subjects, BENCHMARKS[task]["over"], first.get(task))
        cell |= {"protocol": protocol, "cut_short": sum(r.get("finish_reason") == "length" for r in records)}
        if metrics[0]:
            cell["metrics"] = {metric: average_metric([m[metric] for m in metrics]) for metric in metrics[0]}
        if "nll_per_token" in metrics[0]:
            nll, error = cell["metrics"]["nll_per_token"].values()
            cell["metrics"]["perplexity"] = {"score": math.exp(nll), "stderr": error and math.exp(nll) * error}
        if None not in confidences:
            cell["calibration"] = calibration(confidences, verdicts)
        results[name][task] = cell
        first.setdefault(task, verdicts)
    correct_for_many(results)
    return results, samples


def correct_for_many(results):
    """Adds to each comparison its p-value corrected for all comparisons of the table, and what it could have shown."""
    pairs = [cell["vs_first"] for cells in results.values() for cell in cells.values() if "vs_first" in cell]
    for versus, p in zip(pairs, holm([versus["p"] for versus in pairs])):
        versus["p_holm"] = p
        versus["smallest"] = versus["stderr"] and POWER * versus["stderr"]


def results_table(results):
    """results.json's content as Markdown, in percent; the first row is what the others are compared with."""

    def text(cell):
        error = "?" if cell["stderr"] is None else f"{100 * cell['stderr']:.1f}"
        versus = cell.get("vs_first")
        return f"{100 * cell['score']:.1f} ± {error}" + (
            f" ({100 * versus['difference']:+.1f}, p = {versus['p_holm']:.2g})" if versus else ""
        )

    first = next(iter(results))
    head = [f"{task} ({cell['protocol']}, n = {cell['n']})" for task, cell in results[first].items()]
    lines = [["checkpoint", *head], ["---"] * (len(head) + 1)]
    lines += [[name, *(text(cell) for cell in cells.values())] for name, cells in results.items()]
    note = "Percent ± one standard error"
    if len(results) > 1:
        m = (len(results) - 1) * len(head)
        note += (
            f"; in brackets the difference to {first} on the same questions and its p-value (exact McNemar test, or "
            f"paired bootstrap for scores that are not 0 or 1, or that average over subjects), corrected by Holm for {m} "
            f"comparison{'s' * (m > 1)}"
        )
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return "\n".join([rows, f"{note}.\n", *in_words(results), *metric_lines(results)])


def in_words(results):
    """Which differences are more than noise, which are not, and how small a one these questions could have shown."""
    first, *others = results
    real, noise, power = [], [], []
    for task in results[first]:
        pairs = {name: results[name][task]["vs_first"] for name in others}
        for name, versus in pairs.items():
            low, high = versus["interval"]
            (real if versus["p_holm"] < 0.05 else noise).append(
                f"{name} on {task} ({100 * versus['difference']:+.1f}, 95% interval {100 * low:+.1f} to {100 * high:+.1f})"
            )
        smallest = max((versus["smallest"] or 0.0 for versus in pairs.values()), default=0.0)
        if smallest:
            power.append(f"{100 * smallest:.1f} on {task} (n = {results[first][task]['n']})")
    lines = [f"More than noise, against {first}: {'; '.join(real)}.\n"] if real else []
    lines += [f"Noise, as far as these questions can tell: {'; '.join(noise)}.\n"] if noise else []
    if power:
        lines.append(
            "Smallest true difference, in points, that would show at p < 0.05 (uncorrected) in four of five such "
            f"evaluations: {'; '.join(power)}.\n"
        )
    return lines


def metric_lines(results):
    """The other figures of a task, and its calibration, a line each."""
    lines = []
    for name, cells in results.items():
        for task, cell in cells.items():
            parts = [f"{metric} {value['score']:.4g}" + ("" if value["stderr"] is None else f" ± {value['stderr']:.2g}")
                     for metric, value in cell.get("metrics", {}).items()]  # fmt: skip
            if "calibration" in cell:
                parts.append(f"expected calibration error {cell['calibration']['ece']:.3f}")
            if parts:
                lines.append(f"- {name}, {task}: {', '.join(parts)}")
    return ["\n".join(["Further figures:", *lines]) + "\n"] if lines else []


def compare_command(argv):
    """eval.py compare A B: the questions that one of two checkpoints answered better, with both replies."""
    p = Parser(prog="eval.py compare", description=compare_command.__doc__)
    p.add_argument("names", nargs=2, help="names of two checkpoints, as the table has them")
    p.add_argument("--out", required=True, help="directory of an evaluation, which holds samples.jsonl")
    a = p.parse_args(argv)
    samples, path = {}, os.path.join(a.out, "samples.jsonl")
    for line, s in read_jsonl(path):
        try:
            samples[s["checkpoint"], s["task"], s["id"]] = s
        except KeyError as e:
            raise InputError(f"{path}:{line}: no {e}; run the evaluation again") from None
    known = list(dict.fromkeys(name for name, _, _ in samples))
    for name in a.names:
        if name not in known:
            raise InputError(f"{path}: no checkpoint {name!r}; it holds {', '.join(known)}")
    text, count = "", collections.defaultdict(lambda: [0, 0, 0])  # per task: A better, B better, n
    for (name, task, id), s in samples.items():
        t = samples.get((a.names[1], task, id))
        if name != a.names[0] or t is None:
            continue
        count[task][2] += 1
        if s["correct"] != t["correct"]:
            count[task][s["correct"] < t["correct"]] += 1
            text += f"## {task} {id}\n\n{s['prompt'][-1]['content']}\n\n"
            for x in (s, t):
                text += (
                    f"### {x['checkpoint']}: {float(x['correct']):g}, read as {x['extracted']!r}\n\n{x['reply']}\n\n"
                )
    lines = [f"{task}: {a.names[0]} better on {x}, {a.names[1]} on {y}, of {n} questions"
             for task, (x, y, n) in count.items()]  # fmt: skip
    path = os.path.join(a.out, "-vs-".join(name.strip("/").replace("/", "_") for name in a.names) + ".md")
    with atomic_write(path) as f:
        f.write(f"# {a.names[0]} and {a.names[1]}\n\n" + "\n".join(f"- {line}" for line in lines) + f"\n\n{text}")
    print("\n".join(lines) + f"\nBoth replies to each of them are in {path}")


def main():
    if sys.argv[1:2] == ["compare"]:
        return compare_command(sys.argv[2:])
    if sys.argv[1:2] == ["judge"]:
        return judge.main(sys.argv[2:])
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", nargs="+", required=True, help="hub ids, directories, .pt files; first the baseline")
    p.add_argument(
        "--protocol", choices=["paper", "loglik"], default="paper", help="chat, or likelihoods of the choices"
    )
    p.add_argument("--allow-code-execution", action="store_true", help="run what the checkpoints write, in a sandbox")
    p.add_argument(
        "--rescore",
        action="store_true",
        help="read the replies in OUT again; no checkpoint is opened, "
        "the other flags are those of the run that asked for them",
    )
    add_reply_flags(p)
    a = p.parse_args()
    if a.protocol == "loglik" and a.repetition_penalty != 1.0:
        raise InputError("--repetition-penalty is for replies; --protocol loglik has none, leave it out")
    names = checkpoint_names(a.ckpt)
    work = {task: prepare(task, a) for task in dict.fromkeys(a.tasks)}
    rank, world = join_group(hours=7 * 24)  # for two barriers: a rank may wait long for another
    if rank == 0:
        for task, questions in work.items():
            subjects = len({q["row"].get("subject") for q in questions})
            print(
                f"{task}: {len(questions)} questions" + (f", {subjects} subjects" if subjects > 1 else ""), flush=True
            )
    if a.rescore:
        said = load_replies(a, names, work)
    else:
        for source in a.ckpt:
            Tokenizer(Checkpoint(source))  # a broken one is better known now than in an hour
        said = collect_replies(a, names, work, rank, world, own_device(a.device))
    leave_group()
    if rank:
        return

    results, samples = score_replies(names, work, said, protocol_name(a))
    write_jsonl(os.path.join(a.out, "samples.jsonl"), samples)
    with atomic_write(os.path.join(a.out, "results.json")) as f:
        json.dump(results, f, indent=1)
    with atomic_write(os.path.join(a.out, "results.md")) as f:
        f.write(results_table(results))
    print(
        f"\n{results_table(results)}\nIn {a.out}: results.json, results.md, samples.jsonl (every prompt, reply and verdict)."
        "\nNext: the same command with another --ckpt or task added; replies that are there are not asked for again."
    )


if __name__ == "__main__":
    cli(main)
