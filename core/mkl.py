"""Calls each of MKL's vector functions once, on one thread, before other code does. core.layers imports this module.

MKL chooses the kernel of a vector function at the function's first call in a process. If two threads make that call at
the same time, as they do for a tensor of more than 2,048 numbers, one of them may run a kernel with four correct
digits instead of seven. Only this call is wrong. In a training run it is the cosines or sines of the first step, so the
step's loss changes in the fifth or sixth digit. Found with MKL 2024.2, which torch's wheels contain (pytorch/pytorch
issue 188792).
"""

import torch

# the functions that torch leaves to MKL, in fp32 and fp64 (ATen/cpu/vml.h)
VECTOR_FUNCTIONS = "acos asin atan cos erf erfc erfinv exp log log10 log2 sin sqrt tan tanh trunc".split()


def choose_kernels() -> None:
    """Computes each function of one number, which starts no thread. Without MKL this changes nothing."""
    for dtype in (torch.float32, torch.float64):
        for name in VECTOR_FUNCTIONS:
            getattr(torch, name)(torch.zeros(1, dtype=dtype, device="cpu"))


choose_kernels()
