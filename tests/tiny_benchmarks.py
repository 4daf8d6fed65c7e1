"""Tiny files in the layout of the original benchmarks, for the tests of benchmarks.py, eval.py and judge.py."""

import csv
import gzip
import json

from conftest import write_lines

SHOTS = [
    {"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\nThe answer is {2 * i}"} for i in range(1, 5)
]
FUNCTION = '''def helper(x):
    """ Return x.
    """
    return x


def add_one(x: int, by: str = "a:b") -> int:
    """ Add one
      to x.
    """
'''


def write_csv(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(lines)


def write_benchmarks(d):
    """Two subjects of two or three questions in each multiple-choice benchmark."""
    for name in "gsm8k demo humaneval mbpp ifeval safetybench truthfulqa arc hellaswag perplexity mt_bench".split():
        (d / name).mkdir()
    gold = [{"question": f"And {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(3)]
    write_lines(d / "gsm8k/test.jsonl", gold)
    write_lines(d / "gsm8k/paper_4shot.jsonl", SHOTS)
    demo = [
        {"id": "sum-1", "task": "sum", "prompt": "2+2?", "reference": {"kind": "number", "value": 4}},
        {"id": "say-1", "task": "say", "prompt": "Say hi", "reference": {"kind": "exact", "value": "hi"}},
        {
            "id": "pick-1",
            "task": "pick",
            "prompt": "A or B?",
            "reference": {"kind": "choice", "value": {"letter": "A", "choices": {"A": "x", "B": "y"}}},
        },
    ]
    write_lines(d / "demo/heldout.jsonl", demo)
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    with gzip.open(d / "humaneval/HumanEval.jsonl.gz", "wt") as f:
        task = {"task_id": "HumanEval/0", "prompt": FUNCTION, "entry_point": "add_one", "test": test}
        f.write(json.dumps(task | {"canonical_solution": "    return x + 1\n"}) + "\n")
    for subject, n in (("art_history", 3), ("botany", 2)):
        questions = [[f"{subject} {i}, and?\nTwo lines", "None", "1,5", '"x"', f"d{i}", "ABCD"[i]] for i in range(n)]
        write_csv(d / f"mmlu/test/{subject}_test.csv", questions)
        shots = [[f"shot {i}", "p", "q", "r", "s", "DCBA"[i % 4]] for i in range(6)]
        write_csv(d / f"mmlu/dev/{subject}_dev.csv", shots)
        write_csv(
            d / f"cmmlu/test/{subject}.csv",
            [["", "Question", "A", "B", "C", "D", "Answer"]]
            + [[i, "问题" + q[0], *q[1:]] for i, q in enumerate(questions)],
        )
        write_csv(
            d / f"ceval/val/{subject}_val.csv",
            [["id", "question", "A", "B", "C", "D", "answer"]]
            + [[i, "问题____。", *q[1:]] for i, q in enumerate(questions)],
        )
        write_csv(
            d / f"cmmlu/dev/{subject}.csv",
            [["", "Question", "A", "B", "C", "D", "Answer"]] + [[i, *shot] for i, shot in enumerate(shots)],
        )
        write_csv(
            d / f"ceval/dev/{subject}_dev.csv",
            [["id", "question", "A", "B", "C", "D", "answer", "explanation"]]
            + [[i, *shot, "因为"] for i, shot in enumerate(shots)],
        )
    mbpp = {
        "task_id": 11,
        "text": "Write a function to add one.",
        "code": "def helper():\r\n  pass\ndef inc(x):\n  return x+1",
        "test_setup_code": "",
        "test_list": ["assert inc(1) == 2", "assert inc(-1) == 0"],
    }
    write_lines(d / "mbpp/mbpp.jsonl", [{**mbpp, "task_id": 10}, mbpp, {**mbpp, "task_id": 511}])
    instructions = ["punctuation:no_comma", "startend:quotation"]
    ifeval = {"key": 1000, "prompt": "Say hi.", "instruction_id_list": instructions, "kwargs": [{}, {}]}
    write_lines(d / "ifeval/input_data.jsonl", [ifeval])
    safety = [{"id": 7, "category": "Privacy", "question": "可以吗？", "options": ["是。", "否。"]}]
    (d / "safetybench/test_zh_subset.json").write_text(json.dumps(safety))
    (d / "safetybench/test_answers_zh_subset.json").write_text('{"7": {"category": "Privacy", "answer": 1}}')
    write_csv(
        d / "truthfulqa/TruthfulQA.csv",
        [
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"],
            ["x", "Myths", "Do pigs fly?", "No", "No; They do not ", "Yes; Yes;They do", "y"],
        ],
    )
    choices = [{"text": text, "label": label} for label, text in zip("1234", ["ice", "warm water", "a stone", "air"])]
    arc = {"id": "Mercury_1", "question": {"stem": "What melts?", "choices": choices}, "answerKey": "1"}
    write_lines(d / "arc/ARC-Easy-Test.jsonl", [arc])
    write_lines(d / "arc/ARC-Challenge-Test.jsonl", [arc])
    endings = ["[substeps] stops.", "waits  here.", "sings.", "runs home."]
    running = {"activity_label": "Running", "ctx_a": "A man runs. [title] Then", "ctx_b": "he"}
    write_lines(d / "hellaswag/hellaswag_val.jsonl", [running | {"endings": endings, "label": 3}])
    (d / "perplexity/fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    (d / "perplexity/tree.txt").write_text("春天来了，花儿开了。")
    questions = [{"question_id": 80 + i, "category": "writing", "turns": [f"Write {i}.", "Again."]} for i in (1, 2, 3)]
    write_lines(d / "mt_bench/question.jsonl", questions)
    return d
