"""experiments.collect on a small folder of a study, and the studies' command lines."""

import json
from pathlib import Path

import pytest
from conftest import write_lines

from experiments.collect import is_looping, portable_command

SCRIPTS = (
    "collect data data_steps general instructions kto_no_z0 kto_parts own_responses paper_table report side_effects "
    "teacher_replies".split()
)
NAMES = ["--student", "S", "--teacher", "T"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help_text(run, script):
    code, out, _ = run(f"experiments.{script}", "--help")
    assert code == 0 and out.startswith("usage:") and "--help" in out


def sample(key, correct, finish="stop", reply="Yes."):
    return {"task": "ifeval", "id": key, "correct": correct, "reply": reply, "reply_tokens": 7, "finish_reason": finish}


@pytest.fixture
def study(tmp_path):
    out = tmp_path / "study"
    for name in (
        "steps",
        "data",
        "eval/test/sft",
        "eval/kept/sft-kto-mmlu",
        "eval/kept/base-perplexity",
        "sft-1e-5.run",
        "kto.run",
    ):
        (out / name).mkdir(parents=True)
    (out / "sft.run").symlink_to("sft-1e-5.run")
    write_lines(out / "kto.run/log.jsonl", [{"step": 1, "loss": 3.0, "tokens": 4}])
    (out / "chosen-sft.json").write_text('{"lr": "1e-5", "dev": {"1e-5": 0.3}}')
    command = ["make_data.py", "--small", "/models/s", "--out", f"{out}/data"]
    (out / "steps/data.json").write_text(json.dumps({"command": command, "seconds": 12.5}))
    (out / "steps/sft-1e-5.json").write_text(json.dumps({"command": ["train_sft.py"], "seconds": 9.0}))
    responses = {"teacher": {"verified": True}, "small": {"verified": False}}
    write_lines(out / "data/6_score.jsonl", [{"responses": responses}, {"responses": {"teacher": {"verified": None}}}])
    write_lines(out / "data/5_respond.jsonl", [{}, {}])
    write_lines(out / "data/sft.jsonl", [{"writer": "teacher"}])
    write_lines(out / "data/kto.jsonl", [{"label": True}, {"label": False}, {"label": True}])
    (out / "data/state.json").write_text('{"1_collect": {"counts": {"in": 3, "out": 2}}, "7_label": {}}')
    rows = [sample("10", True), sample("9", False, "length", "no, " * 9), sample("100", True)]
    write_lines(out / "eval/test/sft/samples.jsonl", rows)
    cell = {"score": 0.5, "stderr": 0.1, "n": 2, "calibration": {"ece": 0.25}}
    (out / "eval/kept/sft-kto-mmlu/results.json").write_text(json.dumps({"x": {"mmlu": cell}}))
    rows = [{"task": "mmlu", "id": f"law/{i}", "correct": i == 1} for i in (1, 0)]
    write_lines(out / "eval/kept/sft-kto-mmlu/samples.jsonl", rows)
    cell = {"score": 0.04, "stderr": None, "n": 1, "metrics": {"perplexity": {"score": 25.0, "stderr": None}}}
    (out / "eval/kept/base-perplexity/results.json").write_text(json.dumps({"x": {"perplexity": cell}}))
    write_lines(
        out / "sft-1e-5.run/log.jsonl",
        [
            {"step": 1, "loss": 2.0, "grad_norm": 1.0, "kl": None, "tokens": 5},
            {"eval_loss": 3},
            {"step": 2, "loss": 1.5, "grad_norm": 0.5, "kl": 0.0, "tokens": 6},
        ],
    )
    return out


def test_collect(study, tmp_path, run):
    code, _, err = run("experiments.collect", "--out", study, *NAMES, "--into", tmp_path / "r.json")
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert (
        result["student"] == "S" and result["teacher"] == "T" and result["seconds"] == {"data": 12.5, "sft-1e-5": 9.0}
    )
    command = ["make_data.py", "--small", "s", "--out", "runs/study/data"]
    assert result["commands"] == {"data": command, "sft-1e-5": ["train_sft.py"]}
    assert result["chosen"] == {"sft": {"lr": "1e-5", "dev": {"1e-5": 0.3}}}
    assert result["data"] == {
        "instructions": 2,
        "sft": 1,
        "sft_writers": {"teacher": 1},
        "sft_unchecked": 1,
        "kto": 3,
        "kto_desirable": 2,
        "steps": {"1_collect": [3, 2]},
        "followed": {"teacher": [1, 2], "small": [0, 1]},
    }
    # the questions in the order of their numbers: 9, 10, 100
    cell = {"right": "011", "reply_tokens": [7, 7, 7], "cut_off": 1, "looping": 1}
    assert result["arms"] == {"sft": {"test": {"ifeval": cell}}}
    assert result["values"] == {
        "sft-kto": {"mmlu": {"score": 0.5, "stderr": 0.1, "n": 2, "right": "01", "ece": 0.25}},
        "base": {"perplexity": {"score": 25.0, "stderr": None, "n": 1}},
    }
    # kto is not finished: it has no step file
    curve = {"loss": [2.0, 1.5], "grad_norm": [1.0, 0.5]}
    assert result["curves"] == {"sft": curve, "sft-1e-5": curve}
    assert result["trained_tokens"] == {"sft": 11, "sft-1e-5": 11}


def test_reasons_of_arms_that_were_not_run(study, tmp_path, run, refused):
    call = ["experiments.collect", "--out", study, *NAMES, "--into", tmp_path / "r.json", "--not-run"]
    assert run(*call, "ties=no time, a = b", "mean=none")[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["not_run"] == {"ties": "no time, a = b", "mean": "none"}
    refused("--not-run tie", *call, "tie=no time")
    refused("--not-run ties", *call, "ties")


def test_collect_leaves_out_data_that_are_not_done(study, tmp_path, run):
    (study / "steps/data.json").unlink()
    code, _, err = run("experiments.collect", "--out", study, *NAMES, "--into", tmp_path / "r.json")
    assert code == 0 and "data" not in json.loads((tmp_path / "r.json").read_text()), err


def test_collect_refuses_other_folders_and_broken_files(study, tmp_path, refused):
    refused("holds no steps", "experiments.collect", "--out", tmp_path, *NAMES)
    (study / "chosen-sft.json").write_text("{")
    refused("chosen-sft.json", "experiments.collect", "--out", study, *NAMES, "--into", tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_looping():
    assert is_looping("Well. " + "again " * 4) and is_looping("abcd" * 4)
    assert not is_looping("again " * 3) and not is_looping("aaaaaaaaaaaaaaa") and not is_looping("")


def test_portable_command(tmp_path):
    out = tmp_path / "study"
    command = ["eval.py", f"{out}/sft", "/models/base", "--n", "5", "runs/x"]
    assert portable_command(command, out) == ["eval.py", "runs/study/sft", "base", "--n", "5", "runs/x"]
    command = ["eval.py", "runs/study-0.5b/sft"]
    assert portable_command(command, Path("runs/study-0.5b")) == command  # a folder of the reader's own
