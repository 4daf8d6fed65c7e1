"""S3FT and self-data distillation: choices by hand, what is asked, the written file trains."""

import json
from pathlib import Path

import pytest
from conftest import write_lines
from training_runs import launch

from variants import s3ft
from variants.s3ft import TELL_TALE, choose_target

REFERENCE = {"kind": "number", "value": "42"}
DEMO = str(Path(s3ft.__file__).parent.parent / "demo/base")


@pytest.mark.parametrize(
    "candidates, verdicts, writer",
    [
        ({"own": "41", "reworded": "so 42"}, {"own": False, "reworded": True}, "reworded"),
        ({"own": "42"}, {"own": True}, "own"),
        ({"own": "41", "reworded": "43"}, {"own": False, "reworded": False}, "gold"),
        ({"own": "?", "reworded": "?"}, {"own": None, "reworded": None}, "gold"),
        ({}, {}, "gold"),
        ({"own": "42", "reworded": "so 42"}, {"own": True, "reworded": True}, "own"),
    ],
)
def test_targets_by_hand(candidates, verdicts, writer):
    assert choose_target("gold", candidates, verdicts) == (writer, {**candidates, "gold": "gold"}[writer])


def test_tell_tales():
    for text in ("The reference answer says 7", "Here is my own response: 7", "Now it's your turn", "Your turn: 7"):
        assert TELL_TALE.search(text)
    assert not TELL_TALE.search("3 + 4 = 7; it is not your turn to answer, says the reference book")


def answer_by_script(monkeypatch, replies):
    """Every model answers with replies[messages' last text, or its first word]. -> the list of all requests."""
    asked = []

    def ask(model, prompts, log, **options):
        asked.extend(prompts)
        found = [next(text for key, text in replies if key in prompt[-1]["content"]) for prompt in prompts]
        return [{"text": text, "finish_reason": "stop"} for text in found]

    monkeypatch.setattr("curation.teacher.ask_model", ask)
    return asked


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def gold(*names, **more):
    return [
        {"prompt": f"{name}?", "completion": f"gold 42 of {name}", "reference": REFERENCE, **more} for name in names
    ]


def test_own_then_reworded_then_gold(tiny, tmp_path, run, monkeypatch):
    data, out = write_lines(tmp_path / "d.jsonl", gold("a", "b", "c")), str(tmp_path / "o")
    replies = [("gold 42 of b", "so 42"), ("gold 42 of c", "43"), ("a?", "42"), ("b?", "41"), ("c?", "41")]
    asked = answer_by_script(monkeypatch, replies)
    code, printed, err = run("variants.s3ft", "--ckpt", tiny, "--data", data, "--out", out)
    assert code == 0, err
    assert [(r["writer"], r["completion"]) for r in lines(f"{out}/sft.jsonl")] == [
        ("own", "42"),
        ("reworded", "so 42"),
        ("gold", "gold 42 of c"),
    ]
    assert [p[-1]["content"] for p in asked[:3]] == ["a?", "b?", "c?"], "the model answers without the gold response"
    assert len(asked) == 5 and not any("gold 42 of a" in p[-1]["content"] for p in asked), "a right answer is kept"
    assert f"{out}/sft.jsonl" in printed and "33.3% own" in printed and "python train_sft.py --ckpt" in printed


def test_self_data_distillation_rewords_everything(tiny, tmp_path, run, monkeypatch):
    records = gold("a", "b", "c", "d") + [{"prompt": "e?", "completion": "gold of e"}]
    data, out = write_lines(tmp_path / "d.jsonl", records), str(tmp_path / "o")
    replies = [("of a", "40 + 2 = 42"), ("of b", "40 + 2 = 43"), ("of c", "The reference answer says 42"), ("of d", "")]
    asked = answer_by_script(monkeypatch, [*replies, ("of e", "mine of e")])
    code, _, err = run("variants.s3ft", "--mode", "sdft", "--ckpt", tiny, "--data", data, "--out", out)
    assert code == 0, err
    writers = [r["writer"] for r in lines(f"{out}/sft.jsonl")]
    assert writers == ["reworded", "gold", "gold", "gold", "reworded"] and len(asked) == 5


def test_gold_stays_where_there_is_no_reference(tiny, tmp_path, run, monkeypatch):
    records = [{"prompt": "a?", "completion": "gold of a"}] + gold("b")
    data, out = write_lines(tmp_path / "d.jsonl", records), str(tmp_path / "o")
    answer_by_script(monkeypatch, [("gold of a", "worded a"), ("a?", "mine of a"), ("b?", "42")])
    code, printed, err = run("variants.s3ft", "--ckpt", tiny, "--data", data, "--out", out)
    assert code == 0, err
    assert [r["completion"] for r in lines(f"{out}/sft.jsonl")] == ["gold of a", "42"]
    assert "1 records have a reply that could not be judged" in printed


def test_long_records_are_kept(tiny, tmp_path, run, monkeypatch):
    data = write_lines(tmp_path / "d.jsonl", gold("a", "x" * 30_000))
    answer_by_script(monkeypatch, [("a?", "42"), ("x?", "41"), ("Here is", "41")])
    assert run("variants.s3ft", "--ckpt", tiny, "--data", data, "--out", tmp_path / "o")[0] == 0
    assert [r["writer"] for r in lines(tmp_path / "o/sft.jsonl")] == ["own", "gold"]


def test_code_is_checked_only_if_allowed(tiny, tmp_path, run, monkeypatch):
    reference = {"kind": "code", "value": {"tests": "assert f(1) == 2", "entry_point": "f"}}
    records = gold("a") + [{"prompt": "b?", "completion": "gold of b", "reference": reference}]
    data = write_lines(tmp_path / "d.jsonl", records)
    answer_by_script(monkeypatch, [("a?", "42"), ("b?", "def f(x):\n    return x + 1")])
    for flags, writer in ([], "gold"), (["--allow-code-execution"], "own"):
        code, _, err = run("variants.s3ft", "--ckpt", tiny, "--data", data, "--out", tmp_path / "o", *flags)
        assert code == 0, err
        assert lines(tmp_path / "o/sft.jsonl")[1]["writer"] == writer


@pytest.fixture
def data(tmp_path):
    """24 of the demo's instructions with their right answers."""
    rows = [json.loads(line) for line in (Path(DEMO).parent / "heldout.jsonl").read_text().splitlines()]
    records = [
        {"prompt": r["prompt"], "completion": r["reference"]["value"], "reference": r["reference"]} for r in rows
    ]
    return write_lines(tmp_path / "d.jsonl", [r for r in records if isinstance(r["completion"], str)][:24])


def test_run_on_the_demo(data, tmp_path, run):
    out = str(tmp_path / "o")
    call = ("variants.s3ft", "--ckpt", DEMO, "--data", data, "--out", out, "--max-new-tokens", 24, "--device", "cpu")
    code, _, err = run(*call)
    assert code == 0, err
    first = lines(f"{out}/sft.jsonl")
    assert len(first) == 24 and {"own", "gold"} <= {r["writer"] for r in first}
    assert all(r["writer"] == "gold" or r["completion"] for r in first)
    kept = Path(out, "replies.jsonl").read_bytes()
    assert run(*call)[0] == 0 and lines(f"{out}/sft.jsonl") == first
    assert Path(out, "replies.jsonl").read_bytes() == kept, "no reply is asked for twice"
    sft = ("--ckpt", DEMO, "--data", f"{out}/sft.jsonl", "--out", tmp_path / "ckpt", "--max-steps", 1)
    assert run("train_sft", *sft)[0] == 0


def test_two_ranks_write_what_one_process_writes(data, tmp_path, run):
    call = ("--ckpt", DEMO, "--data", data, "--max-new-tokens", 24)
    assert run("variants.s3ft", *call, "--out", tmp_path / "one")[0] == 0
    codes, texts = launch("variants.s3ft", (*call, "--out", tmp_path / "two"), tmp_path / "text", 2)
    assert codes == [0, 0] and "".join(texts).count("wrote ") == 1, texts
    assert lines(tmp_path / "two/sft.jsonl") == lines(tmp_path / "one/sft.jsonl")


def test_refusals(tiny, tmp_path, refused):
    call = lambda data, *more: ("variants.s3ft", "--ckpt", tiny, "--data", data, "--out", tmp_path / "o", *more)
    plain = [{"prompt": "a?", "completion": "b"}]
    data = write_lines(tmp_path / "plain.jsonl", plain)
    refused(["plain.jsonl", "reference"], *call(data))
    bare = write_lines(tmp_path / "bare.jsonl", [*gold("a"), {"prompt": "b?"}])
    refused(["bare.jsonl:2", "no response"], *call(bare))
    odd = write_lines(tmp_path / "odd.jsonl", gold("a") + [{**plain[0], "reference": {"kind": "odd"}}])
    refused(["odd.jsonl:2", "kind"], *call(odd))
    refused("--device", *call(odd, "--device", "tpu"))
    empty = write_lines(tmp_path / "empty.jsonl", [])
    refused("empty.jsonl", *call(empty))
    good = write_lines(tmp_path / "good.jsonl", gold("a"))
    refused(
        "no such checkpoint",
        "variants.s3ft",
        "--ckpt",
        "http://localhost:1/v1",
        "--data",
        good,
        "--out",
        tmp_path / "o",
    )
    refused("nowhere", "variants.s3ft", "--ckpt", tmp_path / "nowhere", "--data", good, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").mkdir()
    (tmp_path / "o/sft.jsonl").write_text("mine")
    refused(["sft.jsonl", "not written by"], *call(good))
    assert (tmp_path / "o/sft.jsonl").read_text() == "mine"
