"""Evaluates checkpoints on benchmarks: one table with standard errors and paired tests.

    python eval.py --ckpt Qwen/Qwen2-0.5B-Instruct sft.pt --tasks gsm8k mmlu --limit 200       # -> eval/
    python eval.py compare Qwen2-0.5B-Instruct sft --out eval        # the questions on which these two differ
    python eval.py judge --ckpt base sft.pt --tasks mt_bench --teacher http://HOST:8000/v1 --out judge

--protocol paper reads greedy chat replies. --protocol loglik takes the likeliest choice, as
lm-evaluation-harness does. Scores of different protocols never share a column. The first checkpoint is the baseline.
The benchmarks are in evaluation/benchmarks.py.

OUT/replies.jsonl keeps each reply. If the same command runs again, it asks only the missing questions. The results hold
only the checkpoints and tasks of the last command, so name the earlier ones again. --rescore scores the kept replies
again without loading the models. Under torchrun each rank asks a part of the questions.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
from core.files import InputError, atomic_write, check_arguments, cli, print_next, read_json
from evaluation.flags import checkpoint_names, parse_args, short_name

if __name__ == "__main__":
    check_arguments(parse_args)  # before torch is loaded, so that --help and wrong flags are answered at once

import collections
import itertools
import json
import math
import os
from argparse import Namespace

from tqdm import tqdm

from core.card import table_row
from core.devices import choose_device
from core.distributed import join_ranks, leave_group
from core.outputs import check_folder, claim_folder
from core.records import read_jsonl, write_jsonl
from evaluation import judge
from evaluation.benchmarks import BENCHMARKS, load_questions, score_reply
from evaluation.replies import Replies, Work, collect_replies, load_replies, protocol_name
from evaluation.stats import (
    POWER,
    calibration,
    holm,
    mean_stderr,
    paired_comparison,
    ratio_stderr,
    subjects_mean_stderr,
)
from generate import check_loadable

FILES = ("replies.jsonl", "checkpoints.json", "results.json", "results.md", "samples.jsonl")

# ---------------------------------------------------------------------------------------------------------------------
# Scores


def average_metric(values: list) -> dict:
    """Mean and standard error of a metric.

    values: one per question, each a number, a list of verdicts, or (numerator, denominator).
    """
    pairs = [v if isinstance(v, tuple) else (sum(v), len(v)) if isinstance(v, list) else (v, 1) for v in values]
    score, stderr = ratio_stderr(*zip(*pairs))
    return {"score": score, "stderr": stderr}


def summarise_task(verdicts: list, subjects: list, over: str, first: list | None = None) -> dict:
    """Score, standard error and n of a task, and the paired comparison with the first checkpoint.

    over: the score is a mean over "questions" or "subjects". first: the first checkpoint's verdicts; None for itself.
    """
    subjects = subjects if over == "subjects" else None
    x = [float(v) for v in verdicts]
    score, stderr = subjects_mean_stderr(x, subjects) if subjects else mean_stderr(x)
    cell = {"score": score, "stderr": stderr, "n": len(verdicts)}
    if first is not None:
        cell["vs_first"] = paired_comparison(first, verdicts, subjects)
    return cell


def other_metrics(metrics: list[dict], confidences: list, verdicts: list) -> dict:
    """Further metrics of the task, and the calibration if every question has a confidence."""
    found = {}
    if metrics[0]:
        found["metrics"] = {metric: average_metric([m[metric] for m in metrics]) for metric in metrics[0]}
    if "nll_per_token" in metrics[0]:
        nll, error = found["metrics"]["nll_per_token"].values()
        perplexity = math.exp(min(nll, 700.0))  # of a diverged model: exp(710) overflows
        found["metrics"]["perplexity"] = {"score": perplexity, "stderr": error and perplexity * error}
    if None not in confidences:
        found["calibration"] = calibration(confidences, verdicts)
    return found


def score_replies(names: list[str], work: Work, replies: Replies, protocol: str) -> tuple[dict, list[dict]]:
    """The content of results.json, and the lines of samples.jsonl."""
    results, samples = {name: {} for name in names}, []
    first = {}  # {task: the first checkpoint's verdicts}
    for name, (task, questions) in itertools.product(names, work.items()):
        records = replies[name][task]
        bar = tqdm(records, f"{name} {task}: verdicts", disable=None, leave=False)
        scored = [score_reply(q, record) for record, q in zip(bar, questions)]
        extracted, verdicts, metrics, confidences = zip(*scored)
        for q, record, text, correct in zip(questions, records, extracted, verdicts):
            sample = {"checkpoint": name, "task": task, "id": q["row"]["id"], "prompt": q["messages"]}
            sample |= {k: v for k, v in record.items() if k not in ("key", "code", *sample)}
            samples.append({**sample, "extracted": text, "correct": correct, "protocol": protocol})
        subjects = [q["row"].get("subject") for q in questions]
        cell = summarise_task(verdicts, subjects, BENCHMARKS[task]["over"], first.get(task))
        cell |= {"protocol": protocol, "cut_short": sum(r.get("finish_reason") == "length" for r in records)}
        results[name][task] = cell | other_metrics(metrics, confidences, verdicts)
        first.setdefault(task, verdicts)
    add_corrected_p(results)
    return results, samples


def add_corrected_p(results: dict) -> None:
    """Adds the Holm-corrected p-value and the smallest detectable difference to each comparison."""
    pairs = [cell["vs_first"] for cells in results.values() for cell in cells.values() if "vs_first" in cell]
    for versus, p in zip(pairs, holm([versus["p"] for versus in pairs])):
        versus["p_holm"] = p
        versus["smallest"] = versus["stderr"] and POWER * versus["stderr"]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def results_table(results: dict) -> str:
    """The content of results.json as a Markdown table, in percent. Each row is compared with the first."""

    def text(cell: dict) -> str:
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
        comparisons = (len(results) - 1) * len(head)
        note += (
            f"; in brackets the paired difference to {first} and its p-value, corrected (Holm) for {comparisons} "
            f"comparison{'s' * (comparisons > 1)}. Test: exact McNemar, or the paired bootstrap if scores are not 0 or "
            "1 or average over subjects"
        )
    rows = "".join(f"{table_row(line)}\n" for line in lines)
    return "\n".join([rows, f"{note}.\n", *describe_differences(results), *metric_lines(results)])


def describe_differences(results: dict) -> list[str]:
    """Lines of text: the significant differences, the others, and the smallest difference that can be detected."""
    first, *others = results
    real, noise, power = [], [], []
    for task in results[first]:
        pairs = {name: results[name][task]["vs_first"] for name in others}
        for name, versus in pairs.items():
            low, high = versus["interval"]
            interval = f"95% interval {100 * low:+.1f} to {100 * high:+.1f}"
            text = f"{name} on {task} ({100 * versus['difference']:+.1f}, {interval})"
            (real if versus["p_holm"] < 0.05 else noise).append(text)
        smallest = max((versus["smallest"] or 0.0 for versus in pairs.values()), default=0.0)
        if smallest:
            power.append(f"{100 * smallest:.1f} on {task} (n = {results[first][task]['n']})")
    lines = [f"Significant against {first} (p < 0.05): {'; '.join(real)}.\n"] if real else []
    lines += [f"Not significant: {'; '.join(noise)}.\n"] if noise else []
    if power:
        lines.append(
            "Smallest true difference, in points, found with 80% power at p < 0.05 (uncorrected): "
            f"{'; '.join(power)}.\n"
        )
    return lines


def metric_lines(results: dict) -> list[str]:
    """One line per checkpoint and task that has further metrics, a calibration, or replies cut off by a limit."""
    lines = []
    for name, cells in results.items():
        for task, cell in cells.items():
            parts = []
            for metric, value in cell.get("metrics", {}).items():
                error = "" if value["stderr"] is None else f" ± {value['stderr']:.2g}"
                parts.append(f"{metric} {value['score']:.4g}{error}")
            if "calibration" in cell:
                parts.append(f"expected calibration error {cell['calibration']['ece']:.3f}")
            if cell.get("cut_short"):
                parts.append(f"{cell['cut_short']} of {cell['n']} replies cut off at the maximum length")
            if parts:
                lines.append(f"- {name}, {task}: {', '.join(parts)}")
    return ["\n".join(["Further figures:", *lines]) + "\n"] if lines else []


# ---------------------------------------------------------------------------------------------------------------------
# eval.py compare


def read_samples(path: str) -> dict[tuple, dict]:
    """samples.jsonl as {(checkpoint, task, question id): sample}."""
    samples = {}
    for line, sample in read_jsonl(path):
        try:
            key = sample["checkpoint"], sample["task"], sample["id"]
            if key in samples:
                twice = f"{key[1]} has two questions of the id {key[2]}"
                raise InputError(f"{path}:{line}: {twice}; give each its own in the task's file and evaluate again")
            samples[key] = sample
            # fails if a field that compare_command reads is missing or of another type
            float(sample["correct"]), sample["prompt"][-1]["content"], sample["reply"], sample["extracted"]
        except (KeyError, TypeError, ValueError, IndexError):
            raise InputError(f"{path}:{line}: is not a sample of eval.py; run the evaluation again") from None
    return samples


def differing_questions(samples: dict[tuple, dict], first: str, second: str) -> tuple[list[str], str]:
    """-> (a summary line for each task, Markdown with both replies to each question that they score differently).

    A line has the counts of wins, the mean difference over questions and its p-value.
    """
    text, scores = "", collections.defaultdict(list)  # {task: [(score of first, score of second)]}
    for (name, task, question_id), sample in samples.items():
        other = samples.get((second, task, question_id))
        if name != first or other is None:
            continue
        scores[task].append((sample["correct"], other["correct"]))
        if sample["correct"] != other["correct"]:
            text += f"## {task} {question_id}\n\n{sample['prompt'][-1]['content']}\n\n"
            for x in (sample, other):
                verdict = f"{float(x['correct']):g}, read as {x['extracted']!r}"
                text += f"### {x['checkpoint']}: {verdict}\n\n{x['reply']}\n\n"
    lines = []
    for task, pairs in scores.items():
        wins = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
        found = paired_comparison(*map(list, zip(*pairs)))
        lines.append(
            f"{task}: {first} better on {wins[0]}, {second} on {wins[1]}, of {len(pairs)} questions: "
            f"{100 * found['difference']:+.1f} points, p = {found['p']:.2g} ({found['test']})"
        )
    return lines, text


def compare_command(args: Namespace) -> None:
    """Writes the questions on which two checkpoints score differently, with both replies."""
    path = os.path.join(args.out, "samples.jsonl")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; give the --out of an evaluation that has ended")
    samples = read_samples(path)
    known = list(dict.fromkeys(name for name, _, _ in samples))
    names = [name if name in known else short_name(name) for name in args.names]
    for name, given in zip(names, args.names):
        if name not in known:
            raise InputError(f"{path}: no checkpoint {given!r}; it holds {', '.join(known)}")
    first, second = names
    lines, text = differing_questions(samples, first, second)
    path = os.path.join(args.out, "-vs-".join(name.strip("/").replace("/", "_") for name in names) + ".md")
    claim_folder(args.out, "eval.py", [os.path.basename(path)])
    with atomic_write(path) as f:
        f.write(f"# {first} and {second}\n\n" + "\n".join(f"- {line}" for line in lines) + f"\n\n{text}")
    print("\n".join(lines) + f"\nwrote {path} (both replies to each question that they score differently)")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def replaced_results(path: str, results: dict) -> list[str]:
    """The checkpoints and tasks of an earlier results.json that `results` does not have."""

    def parts(table):
        tasks = (f"{task} ({cell['protocol']})" for cells in table.values() for task, cell in cells.items())
        return [*table, *dict.fromkeys(tasks)]

    try:
        return [name for name in parts(read_json(path)) if name not in parts(results)]
    except (InputError, AttributeError, KeyError, TypeError):  # there is none, or somebody has edited it
        return []


def write_results(args: Namespace, results: dict, samples: list[dict]) -> None:
    write_jsonl(os.path.join(args.out, "samples.jsonl"), samples)
    with atomic_write(os.path.join(args.out, "results.json")) as f:
        json.dump(results, f, indent=1)
    with atomic_write(os.path.join(args.out, "results.md")) as f:
        f.write(results_table(results))


def main() -> None:
    args = parse_args()
    if args.command == "compare":
        return compare_command(args)
    choose_device(args)
    if args.command == "judge":
        return judge.main(args)
    names = checkpoint_names(args.ckpt)
    check_folder(args.out, "eval.py", FILES)
    if not args.rescore:
        for source in args.ckpt:
            check_loadable(source)
    work = {task: load_questions(task, args) for task in dict.fromkeys(args.tasks)}
    ranks = join_ranks(args.device, hours=7 * 24)  # a rank may wait long for another at a barrier
    if not ranks.rank:
        for task, questions in work.items():
            subjects = len({q["row"].get("subject") for q in questions})
            print(f"{task}: {len(questions)} questions{f', {subjects} subjects' if subjects > 1 else ''}", flush=True)
    if args.rescore:
        replies = load_replies(args, names, work)
    else:
        if not ranks.rank:
            claim_folder(args.out, "eval.py", FILES)
        replies = collect_replies(args, names, work, ranks)
    leave_group()
    if ranks.rank:
        return
    results, samples = score_replies(names, work, replies, protocol_name(args))
    replaced = replaced_results(os.path.join(args.out, "results.json"), results)
    write_results(args, results, samples)
    print(f"\n{results_table(results)}")
    print(f"wrote {args.out}/results.json, results.md and samples.jsonl (prompts, replies, verdicts)")
    if replaced:
        print(f"These files no longer have {', '.join(replaced)}; name all in one command, or give another --out.")
    if len(names) > 1:
        print_next("python", "eval.py", "compare", *names[:2], "--out", args.out)
    else:
        print("next: add checkpoints or tasks to this command; the replies in OUT are not generated again")


if __name__ == "__main__":
    cli(main)
