"""benchmarks.py and benchdata.py: exact prompts, verdicts, broken files, downloads."""

import gzip
import hashlib
import io
import json
import math
import os
from argparse import Namespace

import pytest
from tiny_benchmarks import FUNCTION, SHOTS, write_benchmarks

from core.files import InputError
from evaluation import downloads
from evaluation.benchmarks import BENCHMARKS, choice_scores, load_questions, score_reply
from evaluation.downloads import FOUR_SHOTS_SHA256, ORIGINS, find_data_file
from evaluation.rows import json_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("data"))


def find_in(d):
    return lambda name: find_data_file(str(d), name)


def prompts(task, d):
    return [BENCHMARKS[task]["prompt"](row) for row in BENCHMARKS[task]["rows"](find_in(d))]


# ---------------------------------------------------------------- prompts and verdicts


def test_prompts_are_the_protocols(data):
    line = (
        "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D "
        "as the answer to this question.\n\n"
    )
    assert prompts("mmlu", data)[1] == line + 'art_history 1, and?\nTwo lines\nA. None\nB. 1,5\nC. "x"\nD. d1\n'
    assert prompts("cmmlu", data)[0] == line + '问题art_history 0, and?\nTwo lines\nA. None\nB. 1,5\nC. "x"\nD. d0\n'
    assert prompts("ceval", data)[3] == '问题____。\n\nA. None\nB. 1,5\nC. "x"\nD. d0\n'
    assert prompts("gsm8k", data)[2] == (
        "Question: What is 1 + 1?\nLet's think step by step\n1 + 1 = 2\nThe answer is 2\n\n"
        "Question: What is 2 + 2?\nLet's think step by step\n2 + 2 = 4\nThe answer is 4\n\n"
        "Question: What is 3 + 3?\nLet's think step by step\n3 + 3 = 6\nThe answer is 6\n\n"
        "Question: What is 4 + 4?\nLet's think step by step\n4 + 4 = 8\nThe answer is 8\n\n"
        "Question: And 2 + 1?\nLet's think step by step"
    )
    # the signature is the tested function's; the text is the first docstring's, a helper's here, as the protocol has it
    assert prompts("humaneval", data)[0] == (
        'Write a Python function `add_one(x: int, by: str = "a:b") -> int` to solve the following problem:\n'
        "Return x.\n\n" + FUNCTION
    )
    assert prompts("mbpp", data) == [
        "You are an expert Python programmer, and here is your task: Write a function to add one. Your code should pass these "
        "tests:\n\nassert inc(1) == 2\nassert inc(-1) == 0"
    ]
    assert prompts("safetybench", data) == ["可以吗？\n\nA. 是。\nB. 否。\n"]
    assert prompts("ifeval", data) == ["Say hi."] and prompts("mt_bench", data)[0] == "Write 1."
    assert prompts("demo", data) == ["2+2?", "Say hi", "A or B?"]


def test_verdicts(data):
    def verdict(task, i, reply):
        return BENCHMARKS[task]["verdict"](reply, BENCHMARKS[task]["rows"](find_in(data))[i])

    assert verdict("gsm8k", 2, "2 + 1 = 3. The answer is 3.") == (3.0, True)
    assert verdict("gsm8k", 2, "I cannot say") == (None, False)
    assert verdict("mmlu", 1, "The answer is B.") == ("B", True) and verdict("mmlu", 1, "It is d1") == ("D", False)
    assert verdict("ceval", 0, "答案是A。") == ("A", True)
    good = "```python\ndef add_one(x, by=''):\n    return x + 1\n```"
    assert verdict("humaneval", 0, good) == ("    return x + 1", True, {"unchecked": False})
    assert verdict("humaneval", 0, "    exit(0)")[1] is False
    assert verdict("demo", 0, "It is 4.") == (4.0, True) and verdict("demo", 1, "Hi. ") == ("Hi.", True)
    assert verdict("demo", 2, "y") == ("B", False) and verdict("demo", 2, "B or so: \\boxed{A}") == ("A", True)
    assert verdict("mbpp", 0, "```python\ndef inc(x):\n    return x + 1\n```")[1] is True
    assert verdict("mbpp", 0, "```python\ndef inc(x):\n    return 2\n```")[1] is False
    assert verdict("safetybench", 0, "选B") == ("B", True)
    # without its first line the reply follows both; as it is, only the ban on commas
    metrics = {"prompt_loose": True, "instruction_strict": [True, False], "instruction_loose": [True, True]}
    assert verdict("ifeval", 0, 'Here:\n"hi"') == (["punctuation:no_comma"], False, metrics)


# ---------------------------------------------------------------- --protocol loglik


def contexts(task, d):
    """The rows' contexts and, for each, the choices as they are scored."""
    rows = BENCHMARKS[task]["rows"](find_in(d))
    return rows, BENCHMARKS[task]["contexts"](rows, find_in(d))


@pytest.mark.parametrize(
    ("task", "line", "word", "question"),
    [
        ("mmlu", "The following are multiple choice questions (with answers) about art history.", "Answer:", ""),
        ("cmmlu", "以下是关于art history的单项选择题，请直接给出正确答案的选项。", "答案：", "问题"),
        ("ceval", "以下是中国关于art history的单项选择题，请选出其中的正确答案。", "答案：", "问题____。"),
    ],
)
def test_five_shots(data, task, line, word, question):
    shots = "".join(f"shot {i}\nA. p\nB. q\nC. r\nD. s\n{word} {'DCBAD'[i]}\n\n" for i in range(5))
    asked = question if task == "ceval" else question + "art_history 1, and?\nTwo lines"
    assert contexts(task, data)[1][1] == f'{line}\n\n{shots}{asked}\nA. None\nB. 1,5\nC. "x"\nD. d1\n{word}'


def test_chinese_subjects_have_their_names(tmp_path):
    for folder, header in (("cmmlu/dev", "Answer"), ("ceval/dev", "answer")):
        (tmp_path / folder).mkdir(parents=True)
        name = "virology.csv" if "cmmlu" in folder else "marxism_dev.csv"
        (tmp_path / folder / name).write_text(f"Question,A,B,C,D,{header}\nq,1,2,3,4,A\n")
    row = {"question": "q", "choices": dict(zip("ABCD", "1234")), "answer": "A"}
    found = BENCHMARKS["cmmlu"]["contexts"]([{**row, "subject": "virology"}], find_in(tmp_path))
    assert found[0].startswith("以下是关于病毒学的单项选择题")
    found = BENCHMARKS["ceval"]["contexts"]([{**row, "subject": "marxism"}], find_in(tmp_path))
    assert found[0].startswith("以下是中国关于马克思主义基本原理的单项选择题")


def test_choices_as_texts(data):
    rows, asked = contexts("truthfulqa_mc2", data)
    assert asked[0].startswith(
        "Q: What is human life expectancy in the United States?\nA: Human life expectancy in the "
    )
    assert asked[0].count("Q: ") == 7 and asked[0].endswith("in Barcelona, Spain.\n\nQ: Do pigs fly?\nA:")
    assert rows[0]["choices"] == {1: "No", 2: "They do not", 3: "Yes", 4: "They do"} and rows[0]["true"] == [1, 2]
    assert contexts("truthfulqa_mc1", data)[0][0]["choices"] == {1: "No", 2: "Yes", 3: "They do"}
    rows, asked = contexts("arc_easy", data)
    assert asked == ["Question: What melts?\nAnswer:"] and rows[0]["choices"]["2"] == "warm water"
    rows, asked = contexts("hellaswag", data)
    assert asked == ["Running: A man runs.. Then He"] and rows[0]["choices"][0] == " stops." and rows[0]["answer"] == 3
    assert contexts("safetybench", data)[1] == ["可以吗？\nA. 是。\nB. 否。\n答案："]


def test_choice_scores():
    row = {"choices": {"A": "ab", "B": "abcdefgh"}, "answer": "B", "true": ["B"]}
    logps = [-2.0, -4.0]  # per character -1 and -0.5
    share = 1 / (1 + math.exp(-2))
    assert choice_scores(logps, row, "text") == ("A", False, {"acc_norm": True}, pytest.approx(share))
    assert choice_scores(logps, row, "letter") == ("A", False, {}, pytest.approx(share))
    assert choice_scores([x - 5000 for x in logps], row, "letter")[3] == pytest.approx(share)  # no underflow
    label, verdict, metrics, confidence = choice_scores(logps, row, "text", mass=True)
    assert verdict == pytest.approx(1 - share) and metrics == {} and confidence is None


real = pytest.mark.skipif("DATA_DIR" not in os.environ, reason="DATA_DIR names no folder of the original files")


@real
def test_original_files():
    find = find_in(os.environ["DATA_DIR"])
    absent = ("demo", "arc_easy", "arc_challenge", "hellaswag", "perplexity")
    n = {task: len(b["rows"](find)) for task, b in BENCHMARKS.items() if task not in absent}
    assert n == {
        "gsm8k": 1319,
        "mmlu": 14042,
        "cmmlu": 11582,
        "ceval": 1346,
        "humaneval": 164,
        "mbpp": 500,
        "ifeval": 541,
        "safetybench": 2100,
        "truthfulqa_mc1": 813,
        "truthfulqa_mc2": 813,
        "mt_bench": 80,
        "vicuna": 80,
        "alignbench": 683,
    }
    for task in ("mmlu", "cmmlu", "ceval"):
        rows = BENCHMARKS[task]["rows"](find)[::97]
        for row, context in zip(rows, BENCHMARKS[task]["contexts"](rows, find), strict=True):
            assert context.count("\nD. ") >= 6 and row["subject"] not in context.split("\n")[0] or task == "mmlu"
    shots = BENCHMARKS["gsm8k"]["rows"](find)[0]["shots"]
    assert hashlib.sha256(shots.encode()).hexdigest() == FOUR_SHOTS_SHA256
    pinned = {
        name: home for name, home in ORIGINS.items() if os.path.exists(os.path.join(os.environ["DATA_DIR"], name))
    }
    assert len(pinned) == 17 and pinned.pop(
        "truthfulqa/TruthfulQA.csv"
    )  # another version of it lies there, of 813 questions
    for name, (fetch, *rest) in pinned.items():
        if fetch is downloads.from_archive:
            assert downloads.csv_digest(find(name)) == rest[2], name
        elif rest[1]:
            with open(find(name), "rb") as f:
                assert hashlib.sha256(f.read()).hexdigest() == rest[1], name


@real
def test_canonical_solutions_pass():
    for row in BENCHMARKS["humaneval"]["rows"](find_in(os.environ["DATA_DIR"]))[::8]:
        reply = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        assert BENCHMARKS["humaneval"]["verdict"](reply, row)[1], row["id"]
    for row in BENCHMARKS["mbpp"]["rows"](find_in(os.environ["DATA_DIR"]))[::25]:
        assert BENCHMARKS["mbpp"]["verdict"](f"```python\n{row['code']}\n```", row)[1], row["id"]


HELLASWAG = json.dumps({"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["a", None], "label": 0})
ARC = json.dumps({"id": "x", "question": {"stem": 1, "choices": []}, "answerKey": "A"})
SAFETY = {"id": 7, "category": "x", "question": "q", "options": ["a"]}


IFEVAL = '{"key": 1, "prompt": "p", "instruction_id_list": %s, "kwargs": %s}'


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("gsm8k/test.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question"', "test.jsonl:2"),
        ("gsm8k/test.jsonl", '{"question": "q"}', "test.jsonl:1: 'answer'"),
        ("gsm8k/test.jsonl", '{"question": "q", "answer": "none"}', "test.jsonl:1"),
        ("gsm8k/test.jsonl", "", "no rows"),
        ("gsm8k/test.jsonl", '{"question": "q", "answer": "1", "id": [1]}', "test.jsonl:1: 'id' is a list"),
        ("gsm8k/test.jsonl", '{"question": "q", "answer": "1", "subject": {}}', "test.jsonl:1: 'subject' is a dict"),
        ("mmlu/test/art_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", "art_test.csv:2"),
        ("mmlu/test/art_test.csv", "q,1,2,3,4,E\n", "art_test.csv:1"),
        ("mmlu/test/art.csv", "q,1,2,3,4,A\n", "no rows"),
        ("cmmlu/test/art.csv", ",Question,A,B,C,Answer\n0,q,1,2,3,A\n", "art.csv:1"),
        ("ceval/val/art_val.csv", b"id,question,A,B,C,D,answer\n0,\xff,1,2,3,4,A\n", "art_val.csv"),
        ("humaneval/HumanEval.jsonl.gz", "{}", "gzipped"),
        ("demo/heldout.jsonl", '{"id": 1, "prompt": "p", "reference": "4"}', "heldout.jsonl:1: 'reference'"),
        *(
            ("demo/heldout.jsonl", json.dumps({"prompt": "p", "reference": reference}), f"heldout.jsonl:1: {says}")
            for reference, says in (
                ({"value": 1}, "reference needs a kind"),
                ({"kind": "nmber", "value": 1}, "reference needs a kind"),
                ({"kind": "number"}, "the value of the number reference is null"),
                ({"kind": "number", "value": "many"}, "the value of the number reference is .many."),
                ({"kind": "number", "value": True}, "the value of the number reference is true"),
                ({"kind": "exact", "value": 4}, "the value of the exact reference is 4"),
                ({"kind": "choice", "value": "A"}, "the value of the choice reference"),
                ({"kind": "choice", "value": {"letter": "C", "choices": {"A": "a"}}}, "the value of the choice"),
                ({"kind": "choice", "value": {"letter": "", "choices": {"": "a"}}}, "the value of the choice"),
                ({"kind": "choice", "value": {"letter": "no", "choices": {"no": "a"}}}, ".*a letter is one character"),
                ({"kind": "choice", "value": {"letter": "(", "choices": {"(": "a"}}}, "the value of the choice"),
                ({"kind": "format", "value": {"instruction_id_list": []}}, "the value of the format reference"),
                ({"kind": "format", "value": {"instruction_id_list": ["x"], "kwargs": [{}]}}, "unknown instruction"),
                ({"kind": "code", "value": {"entry_point": "f"}}, "the value of the code reference"),
            )
        ),
        ("ifeval/input_data.jsonl", IFEVAL % ("[1]", "[{}]"), "input_data.jsonl:1: unknown instruction 1"),
        ("ifeval/input_data.jsonl", IFEVAL % ('["punctuation:no_comma"]', "[]"), "as many kwargs"),
        ("ifeval/input_data.jsonl", IFEVAL % ('["keywords:existence"]', "[{}]"), "input_data.jsonl:1: the arguments"),
        ("mbpp/mbpp.jsonl", '{"task_id": "1"}', "mbpp.jsonl:1: 'task_id'"),
        ("mbpp/mbpp.jsonl", '{"task_id": 1, "text": "", "code": "", "test_list": [1]}', "mbpp.jsonl:1: 'test_list'"),
        ("hellaswag/hellaswag_val.jsonl", HELLASWAG, "hellaswag_val.jsonl:1: 'endings'"),
        ("arc_easy/../arc/ARC-Easy-Test.jsonl", ARC, "ARC-Easy-Test.jsonl:1: no text where one is needed"),
        ("ifeval/input_data.jsonl", '{"key": 1, "prompt": "p"}', "input_data.jsonl:1: 'instruction_id_list'"),
        ("safetybench/test_zh_subset.json", "[{}]", "test_zh_subset.json"),
        ("safetybench/test_zh_subset.json", json.dumps([SAFETY | {"question": None}]), "question are texts"),
        ("safetybench/test_zh_subset.json", json.dumps([SAFETY | {"options": ["a", 1]}]), "a list of texts"),
        ("safetybench/test_zh_subset.json", json.dumps([SAFETY]), "out of range"),
        *(
            (
                "mt_bench/question.jsonl",
                json.dumps({"question_id": 1, "category": "c", "turns": turns}),
                "the question in",
            )
            for turns in ([], [""], [" \n", "a second turn"])
        ),
        ("truthfulqa_mc1/../truthfulqa/TruthfulQA.csv", "a,b\n1,2\n", "TruthfulQA.csv"),
    ],
)
def test_broken_data(tmp_path, data, file, content, says):
    path = tmp_path / os.path.normpath(file)
    path.parent.mkdir(parents=True)
    if file.startswith("safety"):
        (path.parent / "test_answers_zh_subset.json").write_text('{"7": {"answer": 1}}')
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if file.startswith("gsm8k"):
        (tmp_path / "gsm8k/paper_4shot.jsonl").write_text((data / "gsm8k/paper_4shot.jsonl").read_text())
    with pytest.raises(InputError, match=says) as e:
        BENCHMARKS[file.split("/")[0]]["rows"](find_in(tmp_path))
    assert str(e.value).startswith(str(tmp_path)) and "\n" not in str(e.value)


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "safetybench").mkdir()
    for name, text in ("subset", json.dumps([SAFETY])), ("answers_zh_subset", '{"7": {"answer": 0}}'):
        name = f"test_{name}.json" if "answers" in name else f"test_zh_{name}.json"
        (tmp_path / "safetybench" / name).write_text("\ufeff" + text)
    (row,) = BENCHMARKS["safetybench"]["rows"](find_in(tmp_path))
    assert row["answer"] == "A"


def test_two_questions_of_one_id_are_refused(tmp_path):
    """They would be one question in samples.jsonl. A null counts as no id, and a row without one gets its number."""
    (tmp_path / "demo").mkdir()
    args = Namespace(data_dir=str(tmp_path), limit=None, protocol="paper", allow_code_execution=False)

    def ids(*ids):
        rows = [{"id": i, "prompt": f"p{n}", "reference": {"kind": "number", "value": n}} for n, i in enumerate(ids)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "demo/heldout.jsonl").write_text(text)
        return [q["row"]["id"] for q in load_questions("demo", args)]

    assert ids("a", "b", None, 7) == ["a", "b", "2", "7"]
    for same in (("a", "b", "a"), (3, 4, "3"), ("1", None)):
        last = len(same)
        with pytest.raises(InputError, match=rf"heldout.jsonl:{last}: .*heldout.jsonl:1 has the id \w too;"):
            ids(*same)


def test_a_demo_row_may_have_any_task(tmp_path):
    row = {"prompt": "p", "reference": {"kind": "number", "value": 4}}
    tasks = ["a", 1, None, ["a"], {}]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/heldout.jsonl").write_text("".join(json.dumps(row | {"task": task}) + "\n" for task in tasks))
    args = Namespace(data_dir=str(tmp_path), limit=3, protocol="paper", allow_code_execution=False)
    assert [q["row"]["subject"] for q in load_questions("demo", args)] == ["a", "1", ""]


def test_a_thought_is_no_answer():
    row = {"answer": "#### 4"}
    score = lambda reply: score_reply({"task": "gsm8k", "row": row}, {"reply": reply})[:2]
    assert score("<think>5?</think>\n4") == (4.0, True) and score("<think>4") == (None, False)
    assert score("<think>4</think>It is unclear.") == (None, False)


def arc_line(*labels):
    choices = [{"label": label, "text": "t"} for label in labels]
    return json.dumps({"id": "x", "question": {"stem": "q", "choices": choices}, "answerKey": "A"})


HEADER = "Category,Question,Best Answer,Correct Answers,Incorrect Answers\n"


@pytest.mark.parametrize(
    ("task", "files", "says"),
    [
        ("safetybench", {"test_zh_subset.json": "[]", "test_answers_zh_subset.json": "{}"}, "no question in its files"),
        ("truthfulqa_mc2", {"TruthfulQA.csv": ""}, "no question in its files"),
        ("truthfulqa_mc1", {"TruthfulQA.csv": HEADER}, "no question in its files"),
        ("truthfulqa_mc1", {"TruthfulQA.csv": f"{HEADER}c,q,,,\n"}, "question 0 has no choice 1"),
        ("truthfulqa_mc1", {"TruthfulQA.csv": f"{HEADER}c,q,a,a; b,\n"}, "question 0 has no wrong choice"),
        ("truthfulqa_mc2", {"TruthfulQA.csv": f"{HEADER}c,q,a,a; b,b; a\n"}, "question 0 has no wrong choice"),
        ("truthfulqa_mc2", {"TruthfulQA.csv": f"{HEADER}c,q,a,,b\n"}, "question 0 has no right choice"),
        (
            "mbpp",
            {"mbpp.jsonl": '{"task_id": 1, "text": "", "code": "", "test_list": ["a"]}'},
            "no question in its files",
        ),
        (
            "arc_easy",
            {"ARC-Easy-Test.jsonl": json.dumps({"id": "x", "question": {"stem": "", "choices": []}, "answerKey": "A"})},
            "question x has no choice A",
        ),
        ("arc_easy", {"ARC-Easy-Test.jsonl": arc_line("A")}, "question x has no wrong choice"),
        ("arc_easy", {"ARC-Easy-Test.jsonl": arc_line("A", "B", "A")}, "two choices have one label"),
    ],
)
def test_a_task_without_a_usable_question_is_refused(tmp_path, task, files, says):
    folder = tmp_path / {"arc_easy": "arc", "truthfulqa_mc1": "truthfulqa", "truthfulqa_mc2": "truthfulqa"}.get(
        task, task
    )
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    protocol = "paper" if task in ("safetybench", "mbpp") else "loglik"
    args = Namespace(data_dir=str(tmp_path), limit=None, protocol=protocol, allow_code_execution=True)
    with pytest.raises(InputError, match=says):
        load_questions(task, args)


@pytest.mark.parametrize(("n", "said"), [(0, None), (3, "3 of the five worked examples"), (5, "")])
def test_a_subject_without_its_worked_examples_is_refused(n, said, tmp_path, capsys):
    """The prompt would silently have fewer examples than the harness's."""
    row = "q,a,b,c,d,A\n"
    for folder, name, rows in (("test", "law_test", 1), ("dev", "law_dev", n), ("dev", "art_dev", 5)):
        (tmp_path / "mmlu" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mmlu" / folder / f"{name}.csv").write_text(row * rows)
    args = Namespace(data_dir=str(tmp_path), limit=None, protocol="loglik", allow_code_execution=False)
    if said is None:
        with pytest.raises(InputError, match="mmlu/dev/law_dev.csv: no worked examples"):
            load_questions("mmlu", args)
        return
    assert load_questions("mmlu", args)[0]["messages"][0]["content"].count("Answer: A") == n
    err = capsys.readouterr().err
    assert said in err and bool(err) == bool(said)


def test_half_a_surrogate_pair_in_a_question_is_refused(tmp_path):
    (tmp_path / "demo").mkdir()
    row = {"id": "a", "prompt": "\ud83d?", "reference": {"kind": "number", "value": 4}}
    (tmp_path / "demo/heldout.jsonl").write_text(json.dumps(row))
    args = Namespace(data_dir=str(tmp_path), limit=None, protocol="paper", allow_code_execution=False)
    with pytest.raises(InputError, match="heldout.jsonl:1: question a holds half of a surrogate pair"):
        load_questions("demo", args)


# ---------------------------------------------------------------- downloads


def test_offline_names_the_file(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", offline)
    monkeypatch.setattr(downloads, "hf_hub_download", offline)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, home in ORIGINS.items():
        with pytest.raises(InputError) as e:
            find_data_file(str(tmp_path), name)
        text = str(e.value)
        assert str(tmp_path / name) in text and "\n" not in text
        assert home in text if isinstance(home, str) else home[1] in text and "no route to host" in text
    assert os.listdir(tmp_path) == []


def test_a_download_is_checked(monkeypatch, tmp_path, data):
    """A file that differs from the pinned one is not put in place; an archive's split appears whole."""
    served = tmp_path / "served"
    served.write_bytes(b'{"question": "other"}')
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda url, timeout: open(served, "rb"))
    with pytest.raises(InputError, match="SHA-256"):
        find_data_file(str(tmp_path), "gsm8k/test.jsonl")
    with pytest.raises(InputError, match="not the protocol's"):
        find_data_file(str(tmp_path), "gsm8k/paper_4shot.jsonl")
    pin = hashlib.sha256(served.read_bytes()).hexdigest()
    monkeypatch.setitem(ORIGINS, "gsm8k/test.jsonl", (*ORIGINS["gsm8k/test.jsonl"][:2], pin))
    assert open(find_data_file(str(tmp_path), "gsm8k/test.jsonl"), "rb").read() == served.read_bytes()

    for kind, nested, name in (("tar", "data", "mmlu/test"), ("zip", "", "ceval/val")):
        packed = tmp_path / kind / nested / os.path.basename(name)
        downloads.shutil.copytree(data / name, packed)
        archive = downloads.shutil.make_archive(str(tmp_path / "archive"), kind, tmp_path / kind)
        monkeypatch.setattr(downloads, "hf_hub_download", lambda repo, file, repo_type, archive=archive: archive)
        with pytest.raises(InputError, match="SHA-256"):
            find_data_file(str(tmp_path), name)
        assert not os.path.exists(tmp_path / name.split("/")[0])
        monkeypatch.setitem(ORIGINS, name, (*ORIGINS[name][:3], downloads.csv_digest(data / name)))
        if (child := os.fork()) == 0:  # killed while it writes the split
            monkeypatch.setattr(downloads.shutil, "copyfile", lambda *_: os._exit(9))
            find_data_file(str(tmp_path), name)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert len(os.listdir(tmp_path / name.split("/")[0])) == 1
        assert downloads.csv_digest(find_data_file(str(tmp_path), name)) == downloads.csv_digest(data / name)
        assert os.listdir(tmp_path / name.split("/")[0]) == [os.path.basename(name)]


def test_one_file_of_an_archive_on_a_server(monkeypatch, tmp_path):
    """Parts of the archive are asked for, not all of it; a server that sends all of it is refused."""
    archive = tmp_path / "archive.zip"
    with downloads.zipfile.ZipFile(archive, "w") as z:
        z.writestr("corpus.txt", os.urandom(5 << 20))
        z.writestr("ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl", b'{"id": "Mercury_1"}\n' * 100)
        z.writestr("more.txt", os.urandom(3 << 20))
    data, sent = archive.read_bytes(), []

    class Reply(io.BytesIO):
        headers, status = {"Content-Length": str(len(data))}, 206

    def serve(request, timeout):
        if request.get_method() == "HEAD":
            return Reply()
        low, high = map(int, request.get_header("Range").removeprefix("bytes=").split("-"))
        assert low <= high < len(data)
        sent.append(high + 1 - low)
        return Reply(data[low : high + 1])

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(downloads.urllib.request, "urlopen", serve)
    name = "arc/ARC-Easy-Test.jsonl"
    with pytest.raises(InputError, match="SHA-256"):
        find_data_file(str(tmp_path), name)
    pin = hashlib.sha256(b'{"id": "Mercury_1"}\n' * 100).hexdigest()
    monkeypatch.setitem(ORIGINS, name, (*ORIGINS[name][:3], pin))
    del sent[:]
    assert open(find_data_file(str(tmp_path), name), "rb").read() == b'{"id": "Mercury_1"}\n' * 100
    assert 0 < sum(sent) < len(data) / 2
    monkeypatch.setattr(Reply, "status", 200)
    with pytest.raises(InputError, match="does not send parts"):
        find_data_file(str(tmp_path), "arc/ARC-Challenge-Test.jsonl")


def test_four_shots_are_read_from_their_home(monkeypatch):
    text = downloads.render_shots(SHOTS) + "Question: a fifth\nLet's think step by step\nyes\n\n"
    monkeypatch.setattr(
        downloads, "FOUR_SHOTS_SHA256", hashlib.sha256(downloads.render_shots(SHOTS).encode()).hexdigest()
    )
    assert [json.loads(line) for line in downloads.four_shots(text.encode()).splitlines()] == SHOTS


def test_a_file_is_found_with_and_without_gz(tmp_path):
    (tmp_path / "humaneval").mkdir()
    plain = tmp_path / "humaneval/HumanEval.jsonl"
    plain.write_text("{}\n")
    assert find_data_file(str(tmp_path), "humaneval/HumanEval.jsonl.gz") == str(plain)
    (tmp_path / "gsm8k").mkdir()
    packed = tmp_path / "gsm8k/test.jsonl.gz"
    with gzip.open(packed, "wt") as f:
        f.write('{"question": "1 + 1?", "answer": "#### 2"}\n')
    found = find_data_file(str(tmp_path), "gsm8k/test.jsonl")
    assert found == str(packed) and json_rows(found, question=str)[0]["answer"] == "#### 2"


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "perplexity").mkdir()
    (tmp_path / "perplexity/a.txt").write_text("Hello", encoding="utf-8-sig")
    assert BENCHMARKS["perplexity"]["rows"](find_in(tmp_path)) == [{"id": "a.txt", "text": "Hello"}]
