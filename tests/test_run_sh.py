"""run.sh: the user's links, which steps run again, an interrupted copy. Its scripts are replaced by stand-ins."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

# A Python that writes the files that run.sh reads and notes each call
PYTHON = """#!/usr/bin/env bash
script=$1 out=
while (($#)); do [[ $1 == --out ]] && out=$2; shift; done
echo "$script ${out##*/}" >>calls
case $script in
  make_data.py)
    mkdir -p "$out"
    for name in sft kto; do echo "$name" >"$out/$name.jsonl"; done
    [[ -e $out/replies.jsonl ]] || echo '{"key": "a", "text": "one"}' >"$out/replies.jsonl" ;;
  train_*) [[ -e stopped ]] || mkdir -p "$out" ;; # stopped: as if SIGTERM came
  merge.py) mkdir -p "$out" ;;
esac
"""
ROOMS = ("core", "training", "merging")
TRAINED, FUSED = ["sft", "kto", "sft-kto", "sft-kto-own"], ["mean", "mean-05-95", "ties"]


@pytest.fixture
def run_sh(tmp_path):
    """run_sh(*flags) -> (exit status, stderr) of run.sh in an empty project whose Python ends with status 7."""
    project = tmp_path / "project"
    for name, text in ("tools/venv.sh", "exit 0\n"), (".venv/bin/python", "#!/bin/sh\nexit 7\n"):
        path = project / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(ROOT / "run.sh", project)

    def call(*flags):
        command = ["bash", project / "run.sh", "--teacher", "t", "--sources", "s.jsonl", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1000)
        return done.returncode, done.stderr

    return call


def test_a_users_link_named_base_is_kept(tmp_path, run_sh):
    for name in ("mine", "other", "out"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).write_text(name)
    os.symlink(tmp_path / "mine", tmp_path / "out/base")
    code, err = run_sh("--ckpt", "other", "--out", "out")
    assert (code, err.count("\n")) == (2, 1) and "out/base: exists and was not made by run.sh" in err
    assert os.readlink(tmp_path / "out/base") == str(tmp_path / "mine")
    assert run_sh("--ckpt", "out/base", "--out", "out") == (7, "")  # goes on to make_data.py
    assert os.readlink(tmp_path / "out/base") == str(tmp_path / "mine")


def test_the_link_of_an_earlier_run_is_replaced(tmp_path, run_sh):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).write_text(name)
        assert run_sh("--ckpt", name, "--out", "out") == (7, "")
        assert os.readlink(tmp_path / "out/base") == str(tmp_path / name)


@pytest.fixture
def stand_ins(tmp_path):
    """stand_ins(PATH) -> (exit status, the names of the checkpoints that run.sh made), with the scripts replaced."""
    project, base = tmp_path / "project", tmp_path / "base"
    texts = {"tools/venv.sh": "exit 0\n", ".venv/bin/python": PYTHON, "model.py": "", "calls": ""}
    texts |= dict.fromkeys(["train_sft.py", "train_kto.py", "merge.py", *(f"{room}/code.py" for room in ROOMS)], "")
    texts |= {base / "config.json": "{}", base / "model.safetensors": ""}
    for name, text in texts.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(ROOT / "run.sh", project)

    def call(path=os.environ["PATH"]):
        (project / "calls").write_text("")
        command = [
            "bash",
            "run.sh",
            "--ckpt",
            base,
            "--teacher",
            "t",
            "--sources",
            "s.jsonl",
            "--out",
            tmp_path / "out",
        ]
        done = subprocess.run(command, capture_output=True, cwd=project, timeout=1000, env={**os.environ, "PATH": path})
        calls = [line.split() for line in (project / "calls").read_text().splitlines()]
        return done.returncode, [out for script, out in calls if script.startswith(("train_", "merge"))]

    return call


def test_a_step_runs_again_only_if_its_own_code_changed(tmp_path, stand_ins):
    assert stand_ins() == (0, TRAINED + FUSED) and stand_ins() == (0, [])
    edits = {"merging/code.py": FUSED, "train_kto.py": TRAINED[1:] + FUSED, "training/code.py": TRAINED + FUSED}
    for name, again in edits.items():
        (tmp_path / "project" / name).write_text("# edited")
        assert stand_ins() == (0, again), name


def test_a_training_step_that_was_stopped_is_not_finished(tmp_path, stand_ins):
    (tmp_path / "project/stopped").touch()
    assert stand_ins() == (2, TRAINED[:1]) == stand_ins()
    (tmp_path / "project/stopped").unlink()
    assert stand_ins() == (0, TRAINED + FUSED)


def test_an_interrupted_copy_of_the_data_is_made_again(tmp_path, stand_ins):
    cp = tmp_path / "bin/cp"
    cp.parent.mkdir()
    cp.write_text('#!/bin/sh\nfor to; do :; done\nmkdir -p "$to" && echo half >"$to/kto.jsonl"\nexit 1\n')
    cp.chmod(0o755)
    assert stand_ins(f"{cp.parent}:{os.environ['PATH']}")[0] == 1 and not (tmp_path / "out/own-data").exists()
    assert stand_ins() == (0, TRAINED[1:] + FUSED)
    assert (tmp_path / "out/own-data/replies.jsonl").read_text() == '{"key": "a", "text": "one"}\n'
    assert [p.name for p in (tmp_path / "out/steps").glob("*.copy")] == []


def test_later_replies_of_the_teacher_reach_the_own_data(tmp_path, stand_ins):
    """A larger --target asks the teacher more; the second labelling must not ask it the same again."""
    assert stand_ins()[0] == 0
    first, more, own = (f'{{"key": "{key}", "text": "{key}}}"}}\n' for key in ("a", "b", "c"))
    (tmp_path / "out/data/replies.jsonl").write_text(first + more)
    (tmp_path / "out/own-data/replies.jsonl").write_text(own + first + more[:20])  # a kill cut the last line off
    for _ in range(2):
        assert stand_ins() == (0, [])
        assert (tmp_path / "out/own-data/replies.jsonl").read_text() == own + first + more
