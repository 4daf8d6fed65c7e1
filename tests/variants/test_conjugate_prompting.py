"""Conjugate prompting: the map and its inverse, the paper's questions and verdicts by hand, a run, refusals."""

import json

import pytest
from conftest import ROOT, write_lines

from evaluation.stats import bootstrap
from variants.conjugate_prompting import (
    data_questions,
    drop_difference,
    drop_table,
    leet,
    shots_prompt,
    shots_questions,
    unleet,
)

DEMO = str(ROOT / "demo/base")


def test_the_map_by_hand():
    assert leet("Repeat the input.") == "R3p347 7h3 1npu7."
    assert unleet("R3p347 7h3 1npu7.") == "Repeat the input."
    assert leet("7 x4 + 12: it is at a toe, Otto") == "7 x4 + 12: it is at a toe, O770", "these could not be undone"
    assert unleet("12 + 7 = 19, 1,234.50") == "12 + 7 = 19, 1,234.50"


def test_the_inverse_is_exact_on_the_demos_prompts():
    rows = [json.loads(line) for line in (ROOT / "demo/heldout.jsonl").read_text().splitlines()]
    assert all(unleet(leet(row["prompt"])) == row["prompt"] for row in rows) and len(rows) > 300
    assert sum(leet(row["prompt"]) != row["prompt"] for row in rows) > 300


def test_a_prompt_of_the_papers_test_by_hand():
    request = "What is 7 plus 5?"
    prompt, answer = shots_prompt("capitals", request, str)
    assert prompt.startswith("Write the input in capital letters.\nInput: The boat") and answer == "WHAT"
    assert "\nOutput: THE BOAT" in prompt and prompt.endswith("\nInput: What is 7 plus 5?\nOutput:")
    assert shots_prompt("repeat", request, str)[1] == "What"
    prompt, answer = shots_prompt("repeat", request, leet)
    assert prompt.startswith("R3p347 7h3 1npu7.\nInpu7: Th3 b047") and answer == "Wh47"
    assert prompt.endswith("\nInpu7: Wh47 is 7 plu5 5?\nOu7pu7:"), "numbers stay numbers"
    assert shots_prompt("capitals", request, leet)[1] == "WH47"


def test_a_right_reply_begins_with_the_papers_word():
    check = {(q["id"], q["view"]): q["check"] for q in shots_questions(1)}
    capitals, repeat = check["capitals-0", "plain"], check["repeat-0", "plain"]
    assert capitals(" WHAT IS") and capitals("WHAT") and not capitals("12") and not capitals("What is 7 plus 5?")
    assert repeat("What is") and not repeat("WHAT")
    assert check["capitals-0", "leet"]("WH47 is") and not check["capitals-0", "leet"]("WHAT")


def test_the_papers_questions():
    found = list(shots_questions(100))
    assert len(found) == 400 and found[0]["prompt"] == next(shots_questions(100))["prompt"]
    requests = [q["prompt"].splitlines()[-2] for q in found if q["view"] == "plain"]
    numbers = {int(word.strip("?")) for r in requests for word in r.split() if word.strip("?").isdigit()}
    assert min(numbers) == 4 and max(numbers) == 20
    assert all(any(f" {word} " in r for r in requests) for word in ("plus", "minus", "times"))


def views(plain, leet):
    return {"plain": [x == "1" for x in plain], "leet": [x == "1" for x in leet]}


def test_drops_by_hand():
    base, tuned = views("1110", "1100"), views("1000", "0100")
    test = drop_difference(base, tuned)  # of the drops 1, 0, 0, 0 and 0, 1, 1, 0
    assert test["difference"] == 0.25 - 0.5 and test["interval"] == bootstrap([1, -1, -1, 0])[0]
    assert drop_table(base, tuned).splitlines()[3].split() == ["drop", "0.500", "0.250"]


@pytest.mark.parametrize(
    "base, tuned, words",
    [
        (views("1" * 40, "1" * 40), views("0" * 30 + "1" * 10, "1" * 40), "was hidden, not lost"),
        (views("1" * 40, "1" * 40), views("0" * 30 + "1" * 10, "0" * 30 + "1" * 10), "No sign"),
        (views("1" * 40, "1" * 40), views("0" * 10 + "1" * 30, "0" * 40), "No sign"),
        (views("01" * 20, "01" * 20), views("1" * 40, "1" * 40), "Nothing was lost"),
        (views("1" * 40, "0" * 20 + "1" * 20), views("1" * 40, "1" * 40), "Nothing was lost"),
        (views("1" * 40, "0" * 40), views("0" * 40, "0" * 40), "base itself fails"),
    ],
)
def test_what_a_table_says(base, tuned, words):
    """A drop that is smaller only because the base fails too must not pass for a hidden skill."""
    assert words in drop_table(base, tuned).splitlines()[-1]


def test_replies_are_mapped_back_before_they_are_checked(tmp_path):
    rows = [
        {"prompt": "Repeat the word song.", "reference": {"kind": "exact", "value": "song"}},
        {"prompt": "7 + 12?", "reference": {"kind": "number", "value": "19"}},
    ]
    data = write_lines(tmp_path / "d.jsonl", rows)
    song, leet_song, number, leet_number = (q["check"] for q in data_questions(data, None))
    assert leet_song("50ng") and song("song") and not song("50ng")
    assert leet_number("7h3 5um is 19") and number("19") and not number("20")
    assert [q["view"] for q in data_questions(data, 1)] == ["plain", "leet"]


def test_run(tiny, tmp_path, run):
    out = tmp_path / "o.jsonl"
    heldout = ROOT / "demo/heldout.jsonl"
    call = ("--base", DEMO, "--ckpt", tiny, "--max-new-tokens", 8, "--out", out)
    code, printed, err = run("variants.conjugate_prompting", *call, "--data", heldout, "--limit", 12)
    assert code == 0, err
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert len(lines) == 48 and {(r["checkpoint"], r["view"]) for r in lines} == {
        (source, view) for source in (DEMO, tiny) for view in ("plain", "leet")
    }
    right = sum(r["correct"] for r in lines if r["checkpoint"] == DEMO and r["view"] == "plain")
    assert right > 0 and f"base  {right / 12:8.3f}" in printed and "python -m variants.novelty" in printed
    code, printed, err = run("variants.conjugate_prompting", *call, "--limit", 3)
    assert code == 0 and len(out.read_text().splitlines()) == 24, err


def test_refusals(tiny, tmp_path, refused):
    call = lambda *more: (
        "variants.conjugate_prompting",
        "--base",
        tiny,
        "--ckpt",
        tiny,
        "--out",
        tmp_path / "o",
        *more,
    )
    good = {"prompt": "a", "reference": {"kind": "exact", "value": "b"}}
    code = {"prompt": "a", "reference": {"kind": "code", "value": {"tests": "assert f(1)", "entry_point": "f"}}}
    for name, record, word in (
        ("bare", {"prompt": "a"}, "reference"),
        ("code", code, "leetspeak"),
        ("odd", {"prompt": "a", "reference": {"kind": "odd"}}, "kind"),
    ):
        data = write_lines(tmp_path / f"{name}.jsonl", [good, record])
        refused([f"{name}.jsonl:2", word], *call("--data", data))
    refused("none.jsonl", *call("--data", tmp_path / "none.jsonl"))
    refused("nowhere", *call("--ckpt", tmp_path / "nowhere", "--limit", 2))
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").write_text("mine")
    refused("not written by this command", *call())
