"""DFT: hand-computed numbers, the detached weight, runs."""

import pytest
import torch
from conftest import write_lines
from training_runs import chats, log
from variant_runs import arguments, check_runs, check_shard

from variants.dft import dft_loss

LOGITS = [[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_loss_and_gradient_by_hand():
    z = torch.tensor(LOGITS, requires_grad=True)
    logps = z.log_softmax(-1)[[0, 1], [0, 1]]
    assert logps.tolist() == pytest.approx([-0.407606, -1.551445], abs=1e-6)
    loss = dft_loss(logps, 2)
    loss.backward()
    assert loss.item() == pytest.approx(0.299986, abs=1e-6)
    # without the detach the gradient of the first gold logit would be another number
    want = [-0.111348, 0.081402, 0.029946, 0.022460, -0.083511, 0.061052]
    assert z.grad.flatten().tolist() == pytest.approx(want, abs=1e-6)


def test_runs(tiny, tmp_path, run, monkeypatch):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    whole = check_runs(run, monkeypatch, "variants.dft", tiny, data, tmp_path)
    check_shard("variants.dft", tiny, data, tmp_path, whole)
    assert run("train_sft", *arguments(tiny, data, tmp_path / "sft"))[0] == 0
    assert log(tmp_path / "sft")[0]["loss"] > 2 * log(whole)[0]["loss"]  # the weights are probabilities
