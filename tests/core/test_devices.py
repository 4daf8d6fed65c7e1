"""The defaults of --device and --dtype."""

from argparse import Namespace

import pytest

from core import devices


@pytest.mark.parametrize(
    "found, device, dtype, chosen",
    [
        ("cpu", None, None, ("cpu", "fp32")),
        ("cuda", None, None, ("cuda", "bf16")),
        ("cuda", "cpu", None, ("cpu", "fp32")),  # a CPU is asked for on a machine with a GPU
        ("cuda", "cuda:1", None, ("cuda:1", "bf16")),
        ("cuda", None, "fp32", ("cuda", "fp32")),
        ("cpu", None, "bf16", ("cpu", "bf16")),
    ],
)
def test_the_dtype_follows_the_device(monkeypatch, found, device, dtype, chosen):
    monkeypatch.setattr(devices, "DEVICE", found)
    args = Namespace(device=device, dtype=dtype)
    devices.choose_device(args)
    assert (args.device, args.dtype) == chosen
