"""--protocol loglik against lm-evaluation-harness itself, where it is installed: the same prompts, the same likelihoods.

Its own task files are used; only where their data come from is replaced, by the tiny files of tiny_benchmarks.py. With
REAL_CKPT and DATA_DIR the same questions of the original files are asked on a real checkpoint; as a command,
PYTHONPATH=.:tests python tests/parity/test_harness.py --ckpt C --data-dir D, it measures which of the two is faster on the same questions of MMLU.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines
from tiny_benchmarks import write_benchmarks

from core.checkpoint import Checkpoint
from core.tokenizer import Tokenizer
from eval import summarise_task
from evaluation import benchmarks
from evaluation.benchmarks import BENCHMARKS
from evaluation.downloads import find_data_file
from evaluation.likelihoods import ask_likelihoods, text_logp
from evaluation.rows import choice_rows
from model import Qwen2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
FILES = {
    "mmlu": ("mmlu/dev", "_dev.csv", False),
    "cmmlu": ("cmmlu/dev", ".csv", True),
    "ceval": ("ceval/dev", "_dev.csv", True),
}


def their_doc(task, row):
    """A row as the harness's data set has it."""
    texts = list(row["choices"].values())
    if task == "mmlu":
        return {"question": row["question"], "choices": texts, "answer": "ABCD".index(row["answer"])}
    if task in ("cmmlu", "ceval"):
        names = ("Question", "Answer") if task == "cmmlu" else ("question", "answer")
        return {names[0]: row["question"], **row["choices"], names[1]: row["answer"]}
    if task.startswith("truthfulqa"):
        labels = [int(label in row["true"]) for label in row["choices"]]
        return {"question": row["question"], f"{task[-3:]}_targets": {"choices": texts, "labels": labels}}
    if task.startswith("arc"):
        choices = {"text": texts, "label": list(row["choices"])}
        return {"question": row["question"], "choices": choices, "answerKey": row["answer"]}
    return {key: row[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")} | {"label": str(row["label"])}


@functools.cache
def task_files():
    """The harness's task files of these benchmarks: [(path, text without quotes)]."""
    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    rooms = ("cmmlu", "ceval", "truthfulqa", "arc", "hellaswag")
    paths = [p for p in folder.rglob("*.yaml") if "default" in p.parts or p.parent.name in rooms]
    return [(path, path.read_text().replace('"', "")) for path in paths]


def their_task(task, subject, docs, shots, tmp_path):
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    names = {"mmlu": f"mmlu_{subject}", "cmmlu": f"cmmlu_{subject}", "ceval": f"ceval-valid_{subject}"}
    name = names.get(task, task)
    path = next(path for path, text in task_files() if f"task: {name}\n" in text)
    config = dict(load_yaml(path))
    split = config.get("test_split") or config["validation_split"]
    files = {split: write_lines(tmp_path / f"{name}.jsonl", docs)}
    if shots:
        files[config["fewshot_split"]] = write_lines(tmp_path / f"{name}-shots.jsonl", shots)
    for key in ("dataset_name", "training_split", "tag", "group", "task_alias", "should_decontaminate"):
        config.pop(key, None)
    if not config.get("test_split"):
        config["validation_split"] = split
    elif config.get("validation_split"):
        config.pop("validation_split")
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "num_fewshot": 5 if shots else 0}
    return ConfigurableTask(config=config)


def harness_model(m_dir, batch_size=1):
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(m_dir)  # as its files have it, not as the model's type suggests
    return HFLM(pretrained=str(m_dir), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=batch_size)


def theirs(lm, tasks):
    """The harness tasks' questions -> [{"context", "choices" (texts), "logps", "metrics"}], and the seconds that it asks."""
    for task in tasks:
        task.build_all_requests(limit=None, rank=0, world_size=1)
    started = time.perf_counter()
    logps = iter(lm.loglikelihood([instance for task in tasks for instance in task.instances], disable_tqdm=True))
    seconds, out = time.perf_counter() - started, []
    for task in tasks:
        per_doc = {}
        for instance in task.instances:
            per_doc.setdefault(instance.doc_id, []).append((instance, next(logps)))
        for _, pairs in sorted(per_doc.items()):
            pairs.sort(key=lambda pair: pair[0].idx)
            out.append(
                {
                    "context": pairs[0][0].args[0],
                    "choices": [instance.args[1] for instance, _ in pairs],
                    "logps": [result[0] for _, result in pairs],
                    "metrics": task.process_results(pairs[0][0].doc, [result for _, result in pairs]),
                }
            )
    return out, seconds


def both_ask(task, data_dir, limit, tmp_path, subjects=None):
    """The same questions -> ours (those of prepare), and the harness' tasks that hold them.

    limit: questions in all, or of each of the subjects where they are named."""
    find = lambda name: find_data_file(str(data_dir), name)
    a = argparse.Namespace(
        protocol="loglik", data_dir=str(data_dir), limit=None if subjects else limit, allow_code_execution=False
    )
    questions = benchmarks.load_questions(task, a)
    if subjects:
        questions = [q for s in subjects for q in [q for q in questions if q["row"]["subject"] == s][:limit]]
    rows = [q["row"] for q in questions]
    raw = {}
    if task == "hellaswag":
        raw = dict(enumerate(json.loads(line) for line in open(find("hellaswag/hellaswag_val.jsonl"))))
    their_tasks = []
    for subject in list(dict.fromkeys(row.get("subject") for row in rows)) if task in FILES else [None]:
        mine = [row for row in rows if subject in (None, row.get("subject"))]
        docs = [their_doc(task, raw[int(row["id"])] | {"choices": row["choices"]} if raw else row) for row in mine]
        shots = choice_rows(find(FILES[task][0]), *FILES[task][1:]) if task in FILES else []
        shots = [their_doc(task, shot) for shot in shots if shot["subject"] == subject]
        their_tasks.append(their_task(task, subject, docs, shots, tmp_path))
    return questions, their_tasks


def check_task(task, data_dir, ckpt, limit, tmp_path):
    questions, their_tasks = both_ask(task, data_dir, limit, tmp_path)
    (reference, _), bench = theirs(harness_model(ckpt), their_tasks), BENCHMARKS[task]
    opened = Checkpoint(str(ckpt))
    m, tokenizer = Qwen2.from_pretrained(opened), Tokenizer(opened)
    said = dict(ask_likelihoods(m, tokenizer, questions, batch_size=4))
    assert len(questions) == len(reference)
    for i, (q, want) in enumerate(zip(questions, reference, strict=True)):
        assert q["messages"][0]["content"] == want["context"] and q["choices"] == want["choices"]
        assert said[i]["logps"] == pytest.approx(want["logps"], abs=2e-4, rel=2e-5)
        _, verdict, metrics, _ = benchmarks.score_reply(q, said[i])
        assert verdict == pytest.approx(float(want["metrics"]["acc"]), abs=1e-5)
        if "acc_norm" in want["metrics"] and bench["by"] == "text":
            assert metrics["acc_norm"] == want["metrics"]["acc_norm"]
        assert ("acc_norm" in metrics) == (task in ("truthfulqa_mc1", "arc_easy", "arc_challenge", "hellaswag"))


TASKS = ["mmlu", "cmmlu", "ceval", "truthfulqa_mc1", "truthfulqa_mc2", "arc_easy", "arc_challenge", "hellaswag"]


@pytest.mark.parametrize("task", TASKS)
def test_equal_per_question(task, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_benchmarks(data)
    if task in FILES:  # the harness has the benchmarks' own subjects
        subjects = ("marxism", "law") if task == "ceval" else ("virology", "anatomy")
        for old, new in zip(("art_history", "botany"), subjects, strict=True):
            for path in list((data / task).rglob(f"{old}*")):
                path.rename(path.with_name(path.name.replace(old, new)))
    m = tiny_model(1, tie_word_embeddings=False, initializer_range=0.5, max_position_embeddings=2048)
    m.save(str(tmp_path / "ckpt"), tiny_files())
    check_task(task, data, tmp_path / "ckpt", 5, tmp_path)


@pytest.mark.skipif(
    "DATA_DIR" not in os.environ or "REAL_CKPT" not in os.environ, reason="needs DATA_DIR and REAL_CKPT"
)
@pytest.mark.parametrize("task", TASKS[:5])
def test_equal_on_a_real_checkpoint(task, tmp_path):
    torch.set_grad_enabled(False)
    check_task(task, os.environ["DATA_DIR"], os.environ["REAL_CKPT"], 3, tmp_path)


@pytest.mark.parametrize("positions", [20, 512])
def test_equal_of_whole_texts(positions, tmp_path):
    """The harness' rolling likelihoods, which perplexities are made of."""
    from lm_eval.api.instance import Instance

    m = tiny_model(1, tie_word_embeddings=False, initializer_range=0.5, max_position_embeddings=positions)
    m.save(str(tmp_path / "ckpt"), tiny_files())
    tokenizer, lm = Tokenizer(Checkpoint(tmp_path / "ckpt")), harness_model(tmp_path / "ckpt")
    texts = [
        " ".join(["The capital of France is Paris", "两只狗", "2 + 2 = 4"][i % 3] for i in range(n)) for n in (1, 5, 40)
    ]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    for text, want in zip(texts, lm.loglikelihood_rolling(requests, disable_tqdm=True), strict=True):
        logp, tokens = text_logp(m, tokenizer, text)
        assert logp == pytest.approx(want, rel=1e-5) and tokens == len(tokenizer.encode(text))
    assert tokens > 40


@pytest.mark.parametrize("task, over", [("mmlu", "questions"), ("cmmlu", "questions"), ("ceval", "subjects")])
def test_averages_over_subjects(task, over):
    """As in the harness' groups, which average over questions, but for ceval: docs/benchmarks.md."""
    from lm_eval.api.metrics import aggregate_subtask_metrics

    verdicts = {"law": [True, True, True, False], "marxism": [False] * 19 + [True]}
    subjects = [subject for subject, some in verdicts.items() for _ in some]
    entry = summarise_task(sum(verdicts.values(), []), subjects, BENCHMARKS[task]["over"])
    means, sizes = zip(*((sum(some) / len(some), len(some)) for some in verdicts.values()))
    want = aggregate_subtask_metrics(means, sizes, weight_by_size=over == "questions")
    assert entry["score"] == pytest.approx(want)


# ---------------------------------------------------------------- which is faster, as a command


def main():
    p = argparse.ArgumentParser(
        description="MMLU 5-shot by likelihood: ours and the harness', the same questions, in turns"
    )
    p.add_argument("--ckpt", required=True, help="directory of a checkpoint")
    p.add_argument("--data-dir", required=True, help="folder of the benchmarks")
    p.add_argument("--subjects", nargs="+", default=["anatomy", "astronomy"], help="of MMLU")
    p.add_argument("--limit", type=int, default=50, help="questions of a subject")
    p.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[1, 4, 8], help="that the harness tries; the fastest counts"
    )
    p.add_argument("--repeats", type=int, default=1, help="turns of each side")
    p.add_argument("--threads", type=int, default=2, help="of torch, on both sides")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        questions, tasks = both_ask("mmlu", a.data_dir, a.limit, Path(folder), a.subjects)
    m, tokenizer = Qwen2.from_pretrained(a.ckpt), Tokenizer(Checkpoint(a.ckpt))
    seconds = {}
    for _ in range(a.repeats):
        started = time.perf_counter()
        said = dict(ask_likelihoods(m, tokenizer, questions, batch_size=32))
        seconds.setdefault("ours", []).append(time.perf_counter() - started)
        for size in a.batch_sizes:
            reference, took = theirs(harness_model(a.ckpt, size), tasks)
            seconds.setdefault(f"harness, batch size {size}", []).append(took)
            apart = max(
                abs(x - y) for i, r in enumerate(reference) for x, y in zip(said[i]["logps"], r["logps"], strict=True)
            )
            print(f"batch size {size}: log-likelihoods differ by at most {apart:.1e}", flush=True)
    middle = {side: statistics.median(times) for side, times in seconds.items()}
    for side, s in middle.items():
        print(f"{side:24} {s:8.1f} s for {len(questions)} questions, {len(questions) / s:6.2f} a second")
    best = min(list(middle)[1:], key=middle.get)
    print(
        f"against {best}: {middle[best] / middle['ours']:.2f} x its speed, {a.threads} threads, medians of {a.repeats}"
    )


if __name__ == "__main__":
    main()
