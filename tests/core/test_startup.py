"""The scripts answer --help and wrong flags before they load torch."""

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {  # and a flag of each
    "train_sft.py": "--micro-tokens",
    "train_kto.py": "--micro-tokens",
    "make_data.py": "--teacher",
    "merge.py": "--models",
    "merge.py search": "--evaluations",
    "eval.py": "--tasks",
    "eval.py compare": "--out",
    "eval.py judge": "--teacher",
    "generate.py": "--prompt",
}


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["--nonsense"], 2)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_torch_before_the_arguments_are_read(script, words, code):
    path, *command = script.split()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / path), *command, *words], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == code and (SCRIPTS[script] if code == 0 else "error: ") in output
    assert "core.flags" in output and not any(line.split()[-1] == "torch" for line in done.stderr.splitlines() if line)
