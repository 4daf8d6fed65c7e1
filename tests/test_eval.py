"""eval.py: statistics, exact prompts, the table, and whole runs on a tiny random model and tiny data."""

import csv
import glob
import gzip
import hashlib
import json
import math
import os

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines

import eval as ev
from model import Checkpoint, InputError, Qwen2

# ---------------------------------------------------------------- statistics


def test_mean_stderr():
    mean, stderr = ev.mean_stderr([1.0, 1.0, 1.0, 0.0, 0.0])
    assert mean == pytest.approx(0.6) and stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert ev.mean_stderr([1.0]) == (1.0, None)
    assert ev.mean_stderr([2.0, 4.0]) == (3.0, 1.0)


def test_subjects_mean_stderr():
    x = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    subjects = ["law", "law", "art", "art", "art", "art"]
    mean, stderr = ev.subjects_mean_stderr(x, subjects)
    assert mean == pytest.approx((0.5 + 0.75) / 2)
    assert stderr == pytest.approx(math.sqrt(0.25 / 1 + 0.75 * 0.25 / 3) / 2)
    # one question each: the spread between the subjects
    assert ev.subjects_mean_stderr([1.0, 0.0, 0.0], ["a", "b", "c"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert ev.subjects_mean_stderr([1.0], ["a"]) == (1.0, None)


def test_subjects_stderr_is_the_spread_of_the_score():
    """By simulation: 3 subjects of different sizes and difficulty."""
    sizes, chances = [20, 5, 10], [0.9, 0.5, 0.2]
    subjects = [s for s, n in enumerate(sizes) for _ in range(n)]
    draws = torch.rand(3000, len(subjects), generator=torch.Generator().manual_seed(0))
    x = (draws < torch.tensor([chances[s] for s in subjects])).double().tolist()
    means, errors = zip(*(ev.subjects_mean_stderr(row, subjects) for row in x), strict=True)
    spread = torch.tensor(means).std().item()
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) == pytest.approx(spread, rel=0.05)


def test_mcnemar():
    def p(only_a, only_b, both=3):
        a = [True] * only_a + [False] * only_b + [True] * both
        b = [False] * only_a + [True] * only_b + [True] * both
        assert ev.mcnemar(a, b) == ev.mcnemar(b, a)
        return ev.mcnemar(a, b)

    assert p(0, 0) == 1.0 and p(5, 5) == 1.0 and p(1, 0) == 1.0
    assert p(0, 5) == pytest.approx(2 / 32)
    assert p(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert p(10, 0) == pytest.approx(2 / 1024)
    assert 0 < p(3000, 3300) < 0.001  # no overflow


# ---------------------------------------------------------------- data, as in the benchmarks' own files

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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The layout of the original files, three subjects of two or three questions each."""
    d = tmp_path_factory.mktemp("data")
    for folder in ("gsm8k", "demo", "humaneval"):
        (d / folder).mkdir()
    gold = [{"question": f"And {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(3)]
    write_lines(d / "gsm8k/test.jsonl", gold)
    write_lines(d / "gsm8k/paper_4shot.jsonl", SHOTS)
    demo = [
        {"id": "sum-1", "task": "sum", "prompt": "2+2?", "reference": {"kind": "number", "value": 4}},
        {"id": "say-1", "task": "say", "prompt": "Say hi", "reference": {"kind": "exact", "value": "hi"}},
        {"id": "pick-1", "task": "pick", "prompt": "A or B?",
         "reference": {"kind": "choice", "value": {"letter": "A", "choices": {"A": "x", "B": "y"}}}},
    ]  # fmt: skip
    write_lines(d / "demo/heldout.jsonl", demo)
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    with gzip.open(d / "humaneval/HumanEval.jsonl.gz", "wt") as f:
        f.write(json.dumps({"task_id": "HumanEval/0", "prompt": FUNCTION, "entry_point": "add_one", "test": test,
                            "canonical_solution": "    return x + 1\n"}) + "\n")  # fmt: skip
    for subject, n in (("art_history", 3), ("botany", 2)):
        questions = [[f"{subject} {i}, and?\nTwo lines", "None", "1,5", '"x"', f"d{i}", "ABCD"[i]] for i in range(n)]
        write_csv(d / f"mmlu/test/{subject}_test.csv", questions)
        shots = [[f"shot {i}", "p", "q", "r", "s", "DCBA"[i % 4]] for i in range(6)]
        write_csv(d / f"mmlu/dev/{subject}_dev.csv", shots)
        write_csv(d / f"cmmlu/test/{subject}.csv", [["", "Question", "A", "B", "C", "D", "Answer"]]
                  + [[i, "问题" + q[0], *q[1:]] for i, q in enumerate(questions)])  # fmt: skip
        write_csv(d / f"ceval/val/{subject}_val.csv", [["id", "question", "A", "B", "C", "D", "answer"]]
                  + [[i, "问题____。", *q[1:]] for i, q in enumerate(questions)])  # fmt: skip
    return d


def find_in(d):
    return lambda name: ev.locate(str(d), name)


def prompts(task, d):
    return [ev.BENCHMARKS[task]["prompt"](row) for row in ev.BENCHMARKS[task]["rows"](find_in(d))]


# ---------------------------------------------------------------- prompts


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
    assert prompts("demo", data) == ["2+2?", "Say hi", "A or B?"]


def test_verdicts(data):
    def verdict(task, i, reply):
        return ev.BENCHMARKS[task]["verdict"](reply, ev.BENCHMARKS[task]["rows"](find_in(data))[i])

    assert verdict("gsm8k", 2, "2 + 1 = 3. The answer is 3.") == (3.0, True)
    assert verdict("gsm8k", 2, "I cannot say") == (None, False)
    assert verdict("mmlu", 1, "The answer is B.") == ("B", True) and verdict("mmlu", 1, "It is d1") == ("D", False)
    assert verdict("ceval", 0, "答案是A。") == ("A", True)
    good = "```python\ndef add_one(x, by=''):\n    return x + 1\n```"
    assert verdict("humaneval", 0, good) == ("    return x + 1", True)
    assert verdict("humaneval", 0, "    exit(0)")[1] is False
    assert verdict("demo", 0, "It is 4.") == (4.0, True) and verdict("demo", 1, "Hi. ") == ("Hi.", True)
    assert verdict("demo", 2, "y") == ("B", False)


def test_limit_takes_turns():
    rows = [{"subject": s, "id": f"{s}{i}"} for s, n in (("a", 4), ("b", 1), ("c", 3)) for i in range(n)]
    assert [r["id"] for r in ev.spread(rows, 2)] == ["a0", "b0"]
    assert [r["id"] for r in ev.spread(rows, 5)] == ["a0", "a1", "b0", "c0", "c1"]
    assert ev.spread(rows, 100) == rows
    assert [r["id"] for r in ev.spread([{"id": i} for i in range(5)], 3)] == [0, 1, 2]


real = pytest.mark.skipif("DATA_DIR" not in os.environ, reason="DATA_DIR names no folder of the original files")


@real
def test_original_files():
    find = find_in(os.environ["DATA_DIR"])
    n = {task: len(b["rows"](find)) for task, b in ev.BENCHMARKS.items() if task != "demo"}
    assert n == {"gsm8k": 1319, "mmlu": 14042, "cmmlu": 11582, "ceval": 1346, "humaneval": 164}
    shots = ev.BENCHMARKS["gsm8k"]["rows"](find)[0]["shots"]
    assert hashlib.sha256(shots.encode()).hexdigest() == ev.FOUR_SHOTS
    for name, (fetch, *rest) in ev.HOMES.items():
        if fetch is ev.from_archive:
            assert ev.csv_digest(find(name)) == rest[2], name
        elif rest[1]:
            with open(find(name), "rb") as f:
                assert hashlib.sha256(f.read()).hexdigest() == rest[1], name


@real
def test_canonical_solutions_pass():
    for row in ev.BENCHMARKS["humaneval"]["rows"](find_in(os.environ["DATA_DIR"]))[::6]:
        reply = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        assert ev.BENCHMARKS["humaneval"]["verdict"](reply, row)[1], row["id"]


# ---------------------------------------------------------------- a tiny checkpoint

def tiny_checkpoint(out, seed, positions=2048):
    """Random weights large enough for replies that differ from prompt to prompt."""
    m = tiny_model(seed, tie_word_embeddings=False, initializer_range=0.5, max_position_embeddings=positions)
    m.save(str(out), tiny_files())
    return str(out)


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    d = tmp_path_factory.mktemp("ckpt")
    return [tiny_checkpoint(d / "base", 1), tiny_checkpoint(d / "sft.pt", 2)]


@pytest.fixture
def evaluate(run):
    """eval.py with these arguments, which succeeds; its stdout."""

    def call(*args):
        code, out, err = run("eval", *args)
        assert code == 0, err
        return out

    return call


def load(out):
    with open(out / "samples.jsonl", encoding="utf-8") as f:
        samples = [json.loads(line) for line in f]
    return json.loads((out / "results.json").read_text()), samples


def test_all_tasks(evaluate, tmp_path, data, ckpts):
    out = tmp_path / "out"
    tasks = ["demo", "gsm8k", "mmlu", "cmmlu", "ceval", "humaneval"]
    shown = evaluate("--ckpt", *ckpts, "--tasks", *tasks, "--data-dir", data, "--max-new-tokens", 8, "--batch-size", 3,
        "--allow-code-execution", "--out", out)  # fmt: skip
    results, samples = load(out)
    assert list(results) == ["base", "sft"] and list(results["base"]) == tasks
    n = {"demo": 3, "gsm8k": 3, "mmlu": 5, "cmmlu": 5, "ceval": 5, "humaneval": 1}
    for name, cells in results.items():
        for task, cell in cells.items():
            mine = [s for s in samples if s["checkpoint"] == name and s["task"] == task]
            verdicts = [s["correct"] for s in mine]
            assert cell["n"] == n[task] == len(mine) and cell["protocol"] == "paper" and 0 <= cell["score"] <= 1
            if task == "ceval":
                art, botany = verdicts[:3], verdicts[3:]
                assert cell["score"] == pytest.approx((sum(art) / 3 + sum(botany) / 2) / 2)
            else:
                assert cell["score"] == pytest.approx(sum(verdicts) / n[task])
            assert ("vs_first" in cell) == (name == "sft")
    assert {"checkpoint", "task", "id", "prompt", "reply", "extracted", "correct"} <= set(samples[0])
    assert samples[0]["prompt"] == [{"role": "user", "content": "2+2?"}] and samples[0]["id"] == "sum-1"
    assert samples[6]["id"] == "art_history/0" and samples[-1]["id"] == "HumanEval/0"
    assert len({s["reply"] for s in samples}) > 5  # the tiny models do say something, and not the same
    written = (out / "results.md").read_text()
    assert written in shown and "mmlu: 5 questions, 2 subjects" in shown
    assert "| sft |" in written and "gsm8k (paper, n = 3)" in written
    assert not glob.glob(str(out / "*tmp*"))

    # batching and the company of other questions change no reply
    alone = tmp_path / "alone"
    evaluate("--ckpt", ckpts[1], "--tasks", "mmlu", "--data-dir", data, "--max-new-tokens", 8, "--batch-size", 1,
        "--limit", 2, "--out", alone)  # fmt: skip
    results, few = load(alone)
    assert [s["id"] for s in few] == ["art_history/0", "botany/0"] and results["sft"]["mmlu"]["n"] == 2
    assert {s["id"]: s["reply"] for s in few}.items() <= {
        s["id"]: s["reply"] for s in samples if s["checkpoint"] == "sft" and s["task"] == "mmlu"
    }.items()


def test_resume(monkeypatch, run, evaluate, tmp_path, data, ckpts):
    """After an interruption only what is missing is asked; verdicts are read anew; other settings ask anew."""
    out, asked = tmp_path / "out", []
    args = ["--ckpt", ckpts[0], "--tasks", "demo", "mmlu", "--data-dir", data, "--max-new-tokens", 5, "--out", out]
    iterate = ev.generate_iter

    def counting(m, tokenizer, prompts, stop_after=100, **settings):
        for i, item in enumerate(iterate(m, tokenizer, prompts, **settings)):
            if len(asked) == stop_after:
                raise KeyboardInterrupt
            asked.append(i)
            yield item

    monkeypatch.setattr(ev, "generate_iter", lambda *a, **k: counting(*a, stop_after=5, **k))
    assert run("eval", *args)[0] == 130
    assert os.listdir(out) == ["replies.jsonl"]
    with open(out / "replies.jsonl", "a") as f:
        f.write('{"key": "torn')
    monkeypatch.setattr(ev, "generate_iter", counting)
    evaluate(*args)
    assert len(asked) == 8
    whole = load(out)
    evaluate(*args)
    assert len(asked) == 8 and load(out) == whole
    reference = tmp_path / "reference"
    evaluate(*args[:-1], reference)
    assert len(asked) == 16 and load(reference) == whole
    evaluate(*args, "--max-new-tokens", 6)
    assert len(asked) == 24
    evaluate(*args, "--ckpt", ckpts[1])
    assert len(asked) == 32


def test_room_for_a_reply(evaluate, refused, tmp_path, data):
    """The model's positions end before --max-new-tokens: shorter replies; a refusal where the prompt alone is too long."""
    out, short = tmp_path / "out", tiny_checkpoint(tmp_path / "short", 3, positions=80)
    args = ["--ckpt", short, "--data-dir", data, "--out", out]
    evaluate(*args, "--tasks", "demo")
    results, samples = load(out)
    assert results["short"]["demo"]["n"] == 3
    assert results["short"]["demo"]["cut_short"] == sum(s["finish_reason"] == "length" for s in samples)
    refused("the model ends at 80", "eval", *args, "--tasks", "gsm8k")
    refused("the model ends at 80", "eval", *args, "--tasks", "mmlu", "--protocol", "loglik")


def test_loglik(evaluate, tmp_path, data, ckpts):
    """Letters' log-likelihoods with a shared prefix are those of one plain forward each."""
    out = tmp_path / "out"
    evaluate("--ckpt", ckpts[0], "--tasks", "mmlu", "--protocol", "loglik", "--data-dir", data, "--out", out)
    results, samples = load(out)
    cell = results["base"]["mmlu"]
    assert cell["protocol"] == "loglik" and cell["n"] == 5
    assert "mmlu (loglik, n = 5)" in (out / "results.md").read_text()
    context = samples[4]["prompt"][0]["content"]
    assert context.startswith(
        "The following are multiple choice questions (with answers) about botany.\n\n"
        "shot 0\nA. p\nB. q\nC. r\nD. s\nAnswer: D\n\nshot 1\nA. p\nB. q\nC. r\nD. s\nAnswer: C\n\n"
    )
    assert context.count("Answer:") == 6 and "shot 5" not in context
    assert context.endswith('Answer: D\n\nbotany 1, and?\nTwo lines\nA. None\nB. 1,5\nC. "x"\nD. d1\nAnswer:')
    ckpt = Checkpoint(ckpts[0])
    m, tokenizer = Qwen2.from_pretrained(ckpt), ev.Tokenizer(ckpt)
    for s in samples:
        context = s["prompt"][0]["content"]
        n = len(tokenizer.encode(context))
        for letter, logp in zip("ABCD", s["logps"], strict=True):
            ids = torch.tensor([tokenizer.encode(f"{context} {letter}")])
            with torch.no_grad():
                table = m(ids).log_softmax(-1)[0, n - 1 : -1]
            assert logp == pytest.approx(table.gather(1, ids[0, n:, None]).sum().item(), abs=1e-4)
        assert s["extracted"] == s["reply"] == "ABCD"[s["logps"].index(max(s["logps"]))]
        assert s["correct"] == (s["extracted"] == "ABCD"[int(s["id"].split("/")[1])])


# ---------------------------------------------------------------- bad input


def test_refusals(run, refused, tmp_path, data, ckpts, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    common = ["eval", "--ckpt", ckpts[0], "--data-dir", data, "--out", tmp_path / "out", "--tasks"]
    refused(["gsm9k", *ev.BENCHMARKS], *common, "demo", "gsm9k")
    refused("--allow-code-execution", *common, "gsm8k", "humaneval")
    refused("not implemented for gsm8k", *common, "gsm8k", "--protocol", "loglik")
    refused("twice", *common, "demo", "--ckpt", ckpts[0], ckpts[0])
    refused("nothere", *common, "demo", "--ckpt", ckpts[0], tmp_path / "nothere")
    refused("heldout.jsonl", *common, "demo", "--data-dir", tmp_path)
    refused(["test.jsonl", "https://", "HF_HUB_OFFLINE"], *common, "gsm8k", "--data-dir", tmp_path)
    (tmp_path / "file").write_text("")
    refused("file", *common, "demo", "--out", tmp_path / "file")
    for limit in ("0", "-3", "x"):
        code, _, err = run(*common, "demo", "--limit", limit)
        assert code == 2 and "--limit" in err
    assert not os.path.exists(tmp_path / "out")


def test_code_in_the_demo_needs_permission(evaluate, refused, tmp_path, ckpts):
    (tmp_path / "demo").mkdir()
    code = {"kind": "code", "value": {"tests": "assert f", "entry_point": "f"}}
    write_lines(tmp_path / "demo/heldout.jsonl", [{"id": 1, "prompt": "f", "reference": code}])
    args = ["--ckpt", ckpts[0], "--tasks", "demo", "--data-dir", tmp_path, "--max-new-tokens", 4, "--out", tmp_path / "o"]
    refused("--allow-code-execution", "eval", *args)
    evaluate(*args, "--allow-code-execution")


def test_names():
    assert ev.checkpoint_names(["runs/demo/base", "runs/demo/sft.pt", "Qwen/Qwen2"]) == ["base", "sft", "Qwen2"]
    assert ev.checkpoint_names(["a/model/", "b/model.pt"]) == ["a/model/", "b/model.pt"]


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("gsm8k/test.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question"', "test.jsonl:2"),
        ("gsm8k/test.jsonl", '{"question": "q"}', "test.jsonl:1: 'answer'"),
        ("gsm8k/test.jsonl", '{"question": "q", "answer": "none"}', "test.jsonl:1"),
        ("gsm8k/test.jsonl", "", "no rows"),
        ("mmlu/test/art_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", "art_test.csv:2"),
        ("mmlu/test/art_test.csv", "q,1,2,3,4,E\n", "art_test.csv:1"),
        ("mmlu/test/art.csv", "q,1,2,3,4,A\n", "no rows"),
        ("cmmlu/test/art.csv", ",Question,A,B,C,Answer\n0,q,1,2,3,A\n", "art.csv:1"),
        ("ceval/val/art_val.csv", b"id,question,A,B,C,D,answer\n0,\xff,1,2,3,4,A\n", "art_val.csv"),
        ("humaneval/HumanEval.jsonl.gz", "{}", "gzipped"),
        ("demo/heldout.jsonl", '{"id": 1, "prompt": "p", "reference": "4"}', "heldout.jsonl:1: 'reference'"),
    ],
)
def test_broken_data(tmp_path, data, file, content, says):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if file.startswith("gsm8k"):
        (tmp_path / "gsm8k/paper_4shot.jsonl").write_text((data / "gsm8k/paper_4shot.jsonl").read_text())
    with pytest.raises(InputError, match=says) as e:
        prompts(file.split("/")[0], tmp_path)
    assert str(e.value).startswith(str(tmp_path)) and "\n" not in str(e.value)


# ---------------------------------------------------------------- downloads


def test_offline_names_the_file(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(ev.urllib.request, "urlopen", offline)
    monkeypatch.setattr(ev, "hf_hub_download", offline)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, (_, where, *_) in ev.HOMES.items():
        with pytest.raises(InputError) as e:
            ev.locate(str(tmp_path), name)
        text = str(e.value)
        assert str(tmp_path / name) in text and where in text and "no route to host" in text and "\n" not in text
    assert os.listdir(tmp_path) == []


def test_a_download_is_checked(monkeypatch, tmp_path, data):
    """A file that differs from the pinned one is not put in place; an archive's split appears whole."""
    served = tmp_path / "served"
    served.write_bytes(b'{"question": "other"}')
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(ev.urllib.request, "urlopen", lambda url, timeout: open(served, "rb"))
    with pytest.raises(InputError, match="SHA-256"):
        ev.locate(str(tmp_path), "gsm8k/test.jsonl")
    with pytest.raises(InputError, match="not the protocol's"):
        ev.locate(str(tmp_path), "gsm8k/paper_4shot.jsonl")
    pin = hashlib.sha256(served.read_bytes()).hexdigest()
    monkeypatch.setitem(ev.HOMES, "gsm8k/test.jsonl", (*ev.HOMES["gsm8k/test.jsonl"][:2], pin))
    assert open(ev.locate(str(tmp_path), "gsm8k/test.jsonl"), "rb").read() == served.read_bytes()

    for kind, nested, name in (("tar", "data", "mmlu/test"), ("zip", "", "ceval/val")):
        packed = tmp_path / kind / nested / os.path.basename(name)
        ev.shutil.copytree(data / name, packed)
        archive = ev.shutil.make_archive(str(tmp_path / "archive"), kind, tmp_path / kind)
        monkeypatch.setattr(ev, "hf_hub_download", lambda repo, file, repo_type, archive=archive: archive)
        with pytest.raises(InputError, match="SHA-256"):
            ev.locate(str(tmp_path), name)
        assert os.listdir(tmp_path / name.split("/")[0]) == []
        monkeypatch.setitem(ev.HOMES, name, (*ev.HOMES[name][:3], ev.csv_digest(data / name)))
        assert ev.csv_digest(ev.locate(str(tmp_path), name)) == ev.csv_digest(data / name)


def test_four_shots_are_read_from_their_home(monkeypatch):
    text = ev.render_shots(SHOTS) + "Question: a fifth\nLet's think step by step\nyes\n\n"
    monkeypatch.setattr(ev, "FOUR_SHOTS", hashlib.sha256(ev.render_shots(SHOTS).encode()).hexdigest())
    assert [json.loads(line) for line in ev.four_shots(text.encode()).splitlines()] == SHOTS
