"""The files of make_data.py's steps: moved folders, and files that were edited by hand."""

import json

import pytest

from core.files import InputError
from curation.step_files import STEPS, check_edited, load_state, write_step

RECORD = {
    "id": "a:1",
    "source": "a",
    "prompt": [{"role": "user", "content": "Q"}],
    "response": None,
    "reference": None,
    "language": "en",
    "task_type": "knowledge/explanation",
    "license": None,
}
CLASSIFIED = RECORD | {"primary": "knowledge", "secondary": "geography"}
ANSWERED = {key: CLASSIFIED[key] for key in CLASSIFIED if key != "response"} | {"responses": {"teacher": {"text": "A"}}}
SCORES = {"text": "A", "verified": None, "quality": 5, "safety": 5, "perplexity": None, "composite": 1.0}
SCORED = ANSWERED | {"responses": {"teacher": SCORES}}


def write(out, lines):
    """Runs a step of one source file. -> the step's counts"""
    source = out.parent / "source.jsonl"
    source.write_text("{}\n")
    return write_step(str(out), load_state(str(out)), STEPS[0], [str(source)], {}, lines, {})


def test_a_step_is_kept_when_its_folder_moves(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    counts = write(tmp_path / "one", [(True, RECORD)])
    (tmp_path / "one").rename(tmp_path / "two")
    assert write(tmp_path / "two", iter(())) == counts, "the lines are not asked for"
    assert "(unchanged)" in (printed := capsys.readouterr().out) and "was edited" not in printed
    (tmp_path / "two/1_collect.jsonl").write_text(json.dumps(RECORD | {"response": "A"}) + "\n")
    write(tmp_path / "two", iter(()))
    assert f"{tmp_path}/two/1_collect.jsonl was edited since its step ran and is kept" in capsys.readouterr().out


def test_a_step_that_leaves_no_record_runs_again(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="1_collect.jsonl: no record is left"):
        write(tmp_path / "one", [(False, {"id": "a:1", "reason": "the teacher did not answer"})])
    assert write(tmp_path / "one", [(True, RECORD)])["out"] == 1
    assert write(tmp_path / "one", iter(()))["out"] == 1


@pytest.mark.parametrize(
    "name, record",
    [
        ("1_collect", RECORD),
        ("2_dedup", RECORD),
        ("3_classify", CLASSIFIED),
        ("5_respond", ANSWERED),
        ("6_score", SCORED),
    ],
)
def test_an_edited_record_has_the_keys_of_its_step(name, record, tmp_path):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(record) + "\n")
    check_edited(str(path), name)
    for key in record:
        for broken in ({k: v for k, v in record.items() if k != key}, record | {key: 5}):
            path.write_text(json.dumps(record) + "\n" + json.dumps(broken) + "\n")
            with pytest.raises(InputError, match=f"{name}.jsonl:2: {key} is missing or of a wrong type"):
                check_edited(str(path), name)


def test_edited_responses_and_references(tmp_path):
    path = tmp_path / "6_score.jsonl"
    for broken, words in (
        (ANSWERED, "the response of teacher is .* an object with text, verified, quality"),
        (SCORED | {"responses": {"teacher": "A"}}, "the response of teacher is"),
        (SCORED | {"prompt": []}, "expected a text or a list of messages"),
        (SCORED | {"reference": {"kind": "x"}}, "reference needs a kind"),
    ):
        path.write_text(json.dumps(broken) + "\n")
        with pytest.raises(InputError, match=f"6_score.jsonl:1: {words}"):
            check_edited(str(path), "6_score")
