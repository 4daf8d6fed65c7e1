"""MKL's vector functions are exact at their first call, also when several threads make it.

Without core.mkl, two to three processes in a hundred compute other bits at their first parallel cosine, sine or exp. Each trial is a fork of a process that has imported torch and has not yet called MKL.
"""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from core.mkl import VECTOR_FUNCTIONS

TRIALS = """
import os, sys, torch
if sys.argv[1] == "with": import core.mkl
torch.set_num_threads(1)
x = torch.linspace(0.01, 0.97, 20_000)
for function in torch.cos, torch.sin, torch.exp:
    differ = 0
    for _ in range(int(sys.argv[2])):
        if not (pid := os.fork()):
            torch.set_num_threads(2)
            os._exit(not torch.equal(function(x), function(x)))
        differ += os.waitpid(pid, 0)[1] != 0
    print(differ)
"""


def count_differing(with_or_without, n):
    """How many of n new processes compute other bits at the first call than at the second: of cos, of sin, of exp."""
    command = [sys.executable, "-c", TRIALS, with_or_without, str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=1000)
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_first_parallel_calls_equal_the_second():
    assert count_differing("with", 50) == [0, 0, 0]  # of 150 without core.mkl, none would differ once in fifty times


def test_all_functions_that_torch_leaves_to_mkl_are_called():
    """torch's own header lists them."""
    header = f"{torch.__path__[0]}/include/ATen/cpu/vml.h"
    try:
        lines = open(header).read().splitlines()
    except FileNotFoundError:
        pytest.skip("this torch comes without its headers")
    prefix = "IMPLEMENT_VML_MKL("
    listed = [line[len(prefix) :].split(",")[0] for line in lines if line.startswith(prefix)]
    assert sorted(listed) == sorted(VECTOR_FUNCTIONS)
