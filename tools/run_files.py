"""Reads the files of a run: results, replies, data report, training logs, searches, merges. All are optional."""

import glob
import json
import os
import random
from dataclasses import dataclass, field

from core.files import InputError

MAX_TEXT = 1500  # maximum characters of one text on the page
MAX_QUESTIONS = 400  # maximum questions on the page
CURVES = {  # {key of log.jsonl: (title, unit)}
    "loss": ("Loss", "per token (SFT), per example (KTO)"),
    "eval_loss": ("Held-out loss", "per token (SFT), per example (KTO)"),
    "kl": ("z0, the KL estimate", "nats"),
    "rewards/chosen": ("Reward of desirable", "beta x log-ratio"),
    "rewards/rejected": ("Reward of undesirable", "beta x log-ratio"),
    "rewards/margins": ("Reward margin", "beta x log-ratio"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "lr": ("Learning rate", ""),
    "tokens_per_second": ("Tokens per second", "tokens/s"),
}


@dataclass
class RunFiles:
    """The files of one or several run folders, merged by name."""

    results: dict = field(default_factory=dict)  # {checkpoint: {task: cell}}
    # {"task", "id", "prompt", "by": {checkpoint: [reply, extracted, correct]}}
    questions: list = field(default_factory=list)
    reports: dict = field(default_factory=dict)  # {run: report.json}
    pairs: list = field(default_factory=list)  # {"prompt", "desirable", "undesirable", "about"}
    logs: dict = field(default_factory=dict)  # {run: [record of each step]}
    args: dict = field(default_factory=dict)  # {run: args.json}
    searches: dict = field(default_factory=dict)  # {file: search.json}
    merges: dict = field(default_factory=dict)  # {run: merge.json}


def read_lines(path: str) -> list[dict]:
    """The objects of a JSON Lines file. Skips broken lines, which a run may still be writing."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for text in f:
            try:
                records.append(json.loads(text))
            except ValueError:
                continue
    return [record for record in records if isinstance(record, dict)]


def read_object(path: str) -> dict:
    """The object of a JSON file; {} if it cannot be read, because the run may still be writing it."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def last_user_turn(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt[:MAX_TEXT]
    turns = [str(turn.get("content", "")) for turn in prompt if isinstance(turn, dict) and turn.get("role") == "user"]
    return (turns[-1] if turns else "")[:MAX_TEXT]


def read_questions(path: str, prefix: str) -> list[dict]:
    """At most MAX_QUESTIONS questions of samples.jsonl on which checkpoints score differently."""
    by_question = {}
    for sample in read_lines(path):
        key = sample.get("task"), sample.get("id")
        empty = {"task": key[0], "id": key[1], "prompt": last_user_turn(sample.get("prompt", [])), "by": {}}
        extracted = sample.get("extracted")
        extracted = None if extracted is None else str(extracted)[:200]
        reply = [str(sample.get("reply", ""))[:MAX_TEXT], extracted, float(sample.get("correct") or 0)]
        by_question.setdefault(key, empty)["by"][prefix + str(sample.get("checkpoint"))] = reply
    return [q for q in by_question.values() if len({r[2] for r in q["by"].values()}) > 1][:MAX_QUESTIONS]


def writer_and_scores(record: dict) -> str:
    """Writer and scores of a training record, on one line."""
    scores = record.get("scores") or {}
    shown = {k: scores[k] for k in ("verified", "quality", "safety", "perplexity", "composite") if k in scores}
    return ", ".join([f"writer: {record.get('writer', '?')}", *(f"{k} {v}" for k, v in shown.items() if v is not None)])


def draw_pairs(path: str, seed: int, count: int = 20) -> list[dict]:
    """`count` random pairs of kto.jsonl: the desirable and the undesirable completion of one prompt."""
    sides = {}
    for record in read_lines(path):
        prompt = json.dumps(record.get("prompt"), ensure_ascii=False)
        sides.setdefault(prompt, {}).setdefault(bool(record.get("label")), record)
    both = [pair for pair in sides.values() if len(pair) == 2]
    found = []
    for pair in random.Random(seed).sample(both, min(count, len(both))):
        good, bad = pair[True], pair[False]
        reply = lambda r: str(r["completion"] if isinstance(r["completion"], str) else r["completion"][-1]["content"])
        shown = {
            n: {"reply": reply(r)[:MAX_TEXT], "about": writer_and_scores(r)}
            for n, r in (("desirable", good), ("undesirable", bad))
        }
        about = f"{good.get('category', '')} · {good.get('source', '')} · {good.get('id', '')}"
        found.append({"prompt": last_user_turn(good.get("prompt", [])), "about": about, **shown})
    return found


def read_run(folder: str, prefix: str, seed: int, into: RunFiles) -> None:
    """Adds the files below one run folder. prefix: put before names if several runs share a page."""
    find = lambda pattern: sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
    for path in [*find("results.json"), *find("*/results.json")]:
        into.results |= {prefix + name: cells for name, cells in read_object(path).items() if isinstance(cells, dict)}
    for path in [*find("samples.jsonl"), *find("*/samples.jsonl")]:
        into.questions += read_questions(path, prefix)
    for path in [*find("report.json"), *find("*/report.json")]:
        report = read_object(path)
        if "steps" in report:
            into.reports[prefix + os.path.basename(os.path.dirname(path))] = report
    for path in [*find("kto.jsonl"), *find("data/kto.jsonl")]:
        into.pairs += draw_pairs(path, seed)
    for path in [*find("log.jsonl"), *find("*.run/log.jsonl")]:
        name = prefix + os.path.basename(os.path.dirname(os.path.abspath(path))).removesuffix(".run")
        if records := [r for r in read_lines(path) if "step" in r]:
            into.logs[name] = records
        into.args[name] = read_object(os.path.join(os.path.dirname(path), "args.json"))
    for path in [*find("*.json"), *find("*/*.json")]:
        content = read_object(path) if os.path.getsize(path) < 2**24 else {}
        if "points" in content and "best" in content:
            into.searches[prefix + os.path.relpath(path, folder)] = content
        if os.path.basename(path) == "merge.json" and "models" in content:
            into.merges[prefix + os.path.basename(os.path.dirname(path))] = content


def read_runs(folders: list[str], seed: int) -> RunFiles:
    found = RunFiles()
    for folder in folders:
        if not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder; give the folder of a run, such as runs/demo")
        prefix = f"{os.path.basename(os.path.abspath(folder))}/" if len(folders) > 1 else ""
        read_run(folder, prefix, seed, found)
    if found == RunFiles():
        raise InputError(f"{', '.join(folders)}: holds no results, logs, data report or merges; nothing to show")
    return found
