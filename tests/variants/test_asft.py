"""ASFT: hand-computed numbers, the direction of the KL, the tiled computation, runs."""

import pytest
import torch
from conftest import write_lines
from training_runs import chats, log
from variant_runs import check_runs, check_shard

from model import Qwen2
from train_sft import StepBatch
from training.logps import pack_to_device
from variants.asft import asft_loss, micro_loss
from variants.dft import dft_loss

LOGITS, REF = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
TARGETS = torch.tensor([0, 1])


def test_loss_and_gradient_by_hand():
    z = LOGITS.clone().requires_grad_()
    loss = asft_loss(z, REF, TARGETS, 2, 0.05)
    loss.backward()
    assert loss.item() == pytest.approx(0.305862, abs=1e-6)
    assert asft_loss(LOGITS, REF, TARGETS, 2, 0.1).item() == pytest.approx(0.311739, abs=1e-6)
    want = [-0.105275, 0.076962, 0.028313, 0.023874, -0.088771, 0.064897]
    assert z.grad.flatten().tolist() == pytest.approx(want, abs=1e-6)


def test_the_kl_is_forward():
    kl = asft_loss(LOGITS, REF, TARGETS, 2, 1.0) - asft_loss(LOGITS, REF, TARGETS, 2, 0.0)
    assert kl.item() == pytest.approx(0.117531, abs=1e-6)  # the reverse KL is 0.109119


def test_without_kl_it_is_dft():
    logps = LOGITS.log_softmax(-1)[[0, 1], TARGETS]
    assert asft_loss(LOGITS, REF, TARGETS, 2, 0.0).item() == pytest.approx(dft_loss(logps, 2).item())


def test_the_models_computation_is_the_formula(tiny, kernels):
    model, ref = Qwen2.from_pretrained(tiny), Qwen2.from_pretrained(tiny)
    with torch.no_grad():
        model.model["norm"].weight += 0.3
    examples = [([5, 6, 7, 8], [False, True, True, True]), ([9, 4, 6], [False, False, True])]
    ids, lengths, at, targets, _ = pack_to_device(examples, "cpu")
    want = asft_loss(model(ids, lengths, at), ref(ids, lengths, at), targets, 4, 0.5)
    got = micro_loss(model, StepBatch(0, 1, [0, 1], examples, 4), [0, 1], ref, 0.5)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_runs(tiny, tmp_path, run, monkeypatch):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    whole = check_runs(run, monkeypatch, "variants.asft", tiny, data, tmp_path, "--kl-weight", 5)
    check_shard("variants.asft", tiny, data, tmp_path, whole, "--kl-weight", 5)
    plain = check_runs(run, monkeypatch, "variants.asft", tiny, data, tmp_path / "plain", "--kl-weight", 0)
    assert log(plain)[0]["loss"] == pytest.approx(log(whole)[0]["loss"])  # the KL starts at 0
    assert log(plain)[-1]["loss"] < log(whole)[-1]["loss"]
