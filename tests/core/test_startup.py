"""The training scripts answer --help and wrong flags before they load torch."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("script", ["train_sft.py", "train_kto.py"])
@pytest.mark.parametrize(
    "words, code, said", [(["--help"], 0, "--micro-tokens"), (["--nonsense"], 2, "error: unrecognized")]
)
def test_no_torch_before_the_arguments_are_read(script, words, code, said):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), *words], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == code and said in output
    assert "core.flags" in output and not any(line.split()[-1] == "torch" for line in done.stderr.splitlines() if line)
