"""run.sh: a link named base in --out that run.sh did not make stays as it is."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


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
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
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
