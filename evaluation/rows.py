"""Reads the benchmarks' questions as rows: dicts with "id", "subject" if there are subjects, and the task's fields.

A row reader takes find(name), which returns the path of a benchmark's file (see evaluation/downloads.py).
"""

import csv
import glob
import json
import os
import re
from collections.abc import Callable

from core.files import InputError, check_regular, warn_once
from core.records import read_jsonl
from evaluation.downloads import LETTERS, render_shots
from verification.answers import check_reference, last_number, tested_function

# ---------------------------------------------------------------------------------------------------------------------
# Files


def choice_rows(folder: str, suffix: str, header: bool) -> list[dict]:
    """Rows of a folder of CSV files, one file per subject: question, four choices, and the answer's letter."""
    rows = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*" + suffix))):
        try:
            rows += subject_rows(path, os.path.basename(path)[: -len(suffix)], header)
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise InputError(f"{path}: cannot be read: {e}; fetch it again") from None
    if not rows:
        raise InputError(f"{folder}: no rows in files named *{suffix}; docs/benchmarks.md lists the benchmark files")
    return rows


def subject_rows(path: str, subject: str, header: bool) -> list[dict]:
    """Rows of one file of choice_rows(). header: the first line has the names of the columns."""
    rows = []
    check_regular(path)
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f)
        names = [n.strip() for n in next(reader, [])] if header else ["question", *LETTERS, "answer"]
        names = [n if n in LETTERS else n.lower() for n in names]
        if not {"question", *LETTERS, "answer"} <= set(names):
            raise InputError(f"{path}:1: the header is {names}; it needs question, A, B, C, D and answer")
        for i, cells in enumerate(line for line in reader if line):
            row = dict(zip(names, cells))
            if len(cells) != len(names) or row["answer"].strip() not in tuple(LETTERS):
                expected = f"expected {len(names)} columns, the answer one of A, B, C, D"
                raise InputError(
                    f"{path}:{reader.line_num}: {expected}; found {len(cells)} columns: fetch the file again"
                )
            choices, answer = {x: row[x] for x in LETTERS}, row["answer"].strip()
            row = {"id": f"{subject}/{i}", "subject": subject, "question": row["question"]}
            rows.append({**row, "choices": choices, "answer": answer})
    return rows


def check_shots(counts: dict[str, int], folder: str, suffix: str) -> None:
    """InputError if a subject has no worked example; a warning if it has fewer than five. counts: {subject: number}."""
    for subject, n in counts.items():
        path = os.path.join(folder, subject + suffix)
        if not n:
            raise InputError(f"{path}: no worked examples, which the questions of this subject need; fetch the file")
        if n < 5:
            warn_once(f"{path}: {n} of the five worked examples; the score is another than with five")


def check_choices(row: dict, where: str) -> None:
    """InputError if the answer of a row is none of its choices or empty, or if no choice is right, or none wrong."""
    choices, true = row["choices"], row.get("true", [row["answer"]])
    fault = None if choices.get(row["answer"]) else f"no choice {row['answer']}"
    fault = fault or (None if true else "no right choice") or (None if {*choices} - {*true} else "no wrong choice")
    if fault:
        raise InputError(f"{where}: question {row['id']} has {fault}; fetch the file again")


def are_texts(values: object) -> bool:
    """True for a list of texts."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def json_rows(path: str, **keys: type) -> list[dict]:
    """Rows of a JSON Lines file. keys: the fields that every row has and their types, such as answer=str.

    list[str] is a list of texts, list any other. A row without an "id" gets its number, from 0.
    """
    rows = list(read_jsonl(path))
    for number, row in rows:
        for key, kind in keys.items():
            if not (are_texts(row.get(key)) if kind == list[str] else isinstance(row.get(key), kind)):
                raise InputError(f"{path}:{number}: {key!r} is missing or of a wrong type; a row has {', '.join(keys)}")
        for key in ("id", "subject"):
            if isinstance(row.get(key), list | dict) and key not in keys:
                raise InputError(f"{path}:{number}: {key!r} is a {type(row[key]).__name__}, not a text or a number")
    if not rows:
        raise InputError(f"{path}: no rows")
    return [
        row | {"id": f"{i}" if row.get("id") is None else row["id"], "where": f"{path}:{n}"}
        for i, (n, row) in enumerate(rows)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def gsm8k_rows(find: Callable) -> list[dict]:
    rows = json_rows(find("gsm8k/test.jsonl"), question=str, answer=str)
    shots = render_shots(json_rows(find("gsm8k/paper_4shot.jsonl"), question=str, answer=str))
    for row in rows:
        if last_number(row["answer"]) is None:
            raise InputError(f"{row['where']}: the answer has no number")
    return [{**row, "shots": shots} for row in rows]


def humaneval_rows(find: Callable) -> list[dict]:
    rows = json_rows(find("humaneval/HumanEval.jsonl.gz"), task_id=str, prompt=str, entry_point=str, test=str)
    for row in rows:
        # the protocol takes the first triple-quoted text, even if it belongs to a helper
        row["signature"] = re.search(rf"def\s+({re.escape(row['entry_point'])}.*?):\s*\n", row["prompt"])
        row["docstring"] = re.search(r'(?:"""|\'\'\')(.*?)(?:"""|\'\'\')', row["prompt"], re.DOTALL)
        if not (row["signature"] and row["docstring"]):
            raise InputError(f"{row['where']}: the prompt has no definition of {row['entry_point']} or no docstring")
    return [{**row, "id": row["task_id"]} for row in rows]


def demo_rows(find: Callable) -> list[dict]:
    rows = json_rows(find("demo/heldout.jsonl"), prompt=str, reference=dict)
    for row in rows:
        check_reference(row["reference"], row["where"])
    return [{"subject": str(row.get("task") or ""), **row, "id": str(row["id"])} for row in rows]


def mbpp_rows(find: Callable) -> list[dict]:
    """The test split, problems 11 to 510 (arXiv 2108.07732). entry_point: the function that the tests call."""
    rows = json_rows(find("mbpp/mbpp.jsonl"), task_id=int, text=str, code=str, test_list=list[str])
    for row in rows:
        row["entry_point"] = tested_function(row["code"], "\n".join(row["test_list"]))
    return [{**row, "id": str(row["task_id"])} for row in rows if 11 <= row["task_id"] <= 510]


def ifeval_rows(find: Callable) -> list[dict]:
    rows = json_rows(find("ifeval/input_data.jsonl"), key=int, prompt=str, instruction_id_list=list, kwargs=list)
    for row in rows:
        check_reference({"kind": "format", "value": row}, row["where"])
    return [{**row, "id": str(row["key"])} for row in rows]


def safety_rows(find: Callable) -> list[dict]:
    """SafetyBench's Chinese subset with public answers (arXiv 2309.07045): seven categories of 300 questions."""
    questions, answers = find("safetybench/test_zh_subset.json"), find("safetybench/test_answers_zh_subset.json")
    try:
        with open(questions, encoding="utf-8-sig") as f, open(answers, encoding="utf-8-sig") as g:
            rows, right = json.load(f), json.load(g)
        if not all(are_texts([row["category"], row["question"]]) and are_texts(row["options"]) for row in rows):
            raise TypeError("category and question are texts, options a list of texts")
        return [
            {
                "id": str(row["id"]),
                "subject": row["category"],
                "question": row["question"],
                "choices": dict(zip(LETTERS, row["options"])),
                "answer": LETTERS[: len(row["options"])][right[str(row["id"])]["answer"]],
            }
            for row in rows
        ]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, IndexError) as e:
        raise InputError(f"{questions}: cannot be read together with {answers}: {e!r}; fetch both again") from None


def truthful_rows(find: Callable, true_column: str) -> list[dict]:
    """TruthfulQA's questions. Choices: the answers of true_column, then the incorrect ones."""
    path, rows = find("truthfulqa/TruthfulQA.csv"), []
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            for i, line in enumerate(csv.DictReader(f)):
                true, false = (line[c].split(";") for c in (true_column, "Incorrect Answers"))
                true = [text.strip() for text in true if text.strip()]
                texts = dict.fromkeys([*true, *(text.strip() for text in false if text.strip())])
                choices = dict(enumerate(texts, 1))
                rows.append(
                    {
                        "id": str(i),
                        "subject": line["Category"],
                        "question": line["Question"].strip(),
                        "choices": choices,
                        "answer": 1,
                        "true": [x for x, text in choices.items() if text in true],
                    }
                )
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError) as e:
        raise InputError(f"{path}: cannot be read: {e!r}; fetch it again") from None
    return rows


def arc_rows(path: str) -> list[dict]:
    rows = []
    for row in json_rows(path, id=str, question=dict, answerKey=str):
        try:
            choices = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
            stem = row["question"]["stem"]
            if not are_texts([stem, *choices, *choices.values()]):
                raise TypeError("text where one is needed")
            if len(choices) < len(row["question"]["choices"]):
                raise InputError(f"{row['where']}: two choices have one label; fetch the file again")
            rows.append({"id": row["id"], "question": stem, "choices": choices, "answer": row["answerKey"]})
        except (KeyError, TypeError) as e:
            needs = "a question has stem and choices, a choice label and text"
            raise InputError(f"{row['where']}: no {e}; {needs}") from None
    return rows


def hellaswag_text(text: str) -> str:
    """Removes WikiHow's bracketed marks, as the harness does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag_rows(find: Callable) -> list[dict]:
    keys = dict(activity_label=str, ctx_a=str, ctx_b=str, endings=list[str], label=int)
    rows = []
    for row in json_rows(find("hellaswag/hellaswag_val.jsonl"), **keys):
        begun = hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = dict(enumerate(map(hellaswag_text, row["endings"])))
        rows.append({"id": row["id"], "question": begun, "choices": endings, "answer": row["label"]})
    return rows


def text_rows(find: Callable) -> list[dict]:
    """One row for each file of perplexity/*.txt."""
    folder, rows = find("perplexity"), []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.txt"))):
        check_regular(path)
        try:
            with open(path, encoding="utf-8-sig") as f:  # some editors write a byte-order mark first
                rows.append({"id": os.path.basename(path), "text": f.read()})
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path}: cannot be read as UTF-8 text: {e}") from None
        if not rows[-1]["text"].strip():
            raise InputError(f"{path}: no text")
    if not rows:
        raise InputError(f"{folder}: no files *.txt; each is one text")
    return rows


def open_rows(path: str, key: str = "turns") -> list[dict]:
    """Questions without a right answer, for `eval.py judge`. Only the first turn is asked."""
    rows = json_rows(path, question_id=int, category=str, **{key: list[str] if key == "turns" else str})
    for row in rows:
        row["asked"] = "".join(row["turns"][:1]) if key == "turns" else row[key]
        if not row["asked"].strip():
            raise InputError(f"{row['where']}: the question in {key!r} is empty; correct the line or remove it")
    return [{"id": str(row["question_id"]), "subject": row["category"], "question": row["asked"]} for row in rows]
