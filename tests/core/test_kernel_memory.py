"""Memory of bf16 matmuls on a CPU: bounded, however many shapes a run has."""

import subprocess
import sys

import pytest
from conftest import ROOT

# Prints the GB by which the process grows over 300 shapes. Each kernel that is kept costs about 5 MB.
GROWTH = """
import sys
import torch
if sys.argv[1] == "with": import core.layers
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e9
weight = torch.ones(4864, 896).bfloat16()
product = lambda n: torch.mm(torch.ones(n, 896).bfloat16(), weight.T)
product(299)
before = resident()
for n in range(300, 600): product(n)
print(resident() - before)
"""


def growth(how):
    command = [sys.executable, "-c", GROWTH, how]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_shapes():
    assert growth("with") < 1.0  # 1.35 without the limit, 0.6 with it
