"""CorDA: the split by hand, the model at the start, folding, covariances, runs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import write_lines
from training_runs import chats, weights
from variant_runs import arguments, check_runs

from model import Qwen2
from variants import corda
from variants.corda import add_corda_adapters, corda_split, input_covariances
from variants.lora import LoRA, fold

W, X = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5]])


def test_corda_by_hand():
    for largest, want in (
        (False, [[0.001356, -0.400810], [-0.002703, 0.798917]]),
        (True, [[1.998644, 0.400810], [1.002703, 0.201083]]),
    ):
        for scale in (1.0, 7.0):  # the scale of the covariance changes nothing
            residual, A, B = corda_split(W, scale * X.T @ X, 1, largest)
            assert A.shape == (1, 2) and B.shape == (2, 1)
            torch.testing.assert_close(B @ A, torch.tensor(want), rtol=0, atol=2e-6)
            torch.testing.assert_close(residual + B @ A, W)


def test_the_damping_grows_until_the_inverse_is_good():
    """A covariance of rank 1 in 64 dimensions, with entries of very different size."""
    x = torch.logspace(0, 6, 64)[None]
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    residual, A, B = corda_split(weight, x.T @ x, 4, True)
    assert A.isfinite().all() and B.isfinite().all()
    torch.testing.assert_close(residual + B @ A, weight, rtol=1e-4, atol=1e-4)


def test_learn_explains_the_inputs_and_keep_ignores_them():
    """W X^T is almost all in the r largest components, and almost nothing of it in the r smallest."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 16, generator=g), torch.randn(400, 16, generator=g) * torch.logspace(0, -3, 16)
    share = lambda parts: ((x @ (parts[2] @ parts[1]).T).norm() / (x @ weight.T).norm()).item()
    covariance = x.T @ x / 400
    assert share(corda_split(weight, covariance, 8, True)) > 0.99
    assert share(corda_split(weight, covariance, 8, False)) < 0.1


def corda_model(tiny, mode="learn"):
    model, g = Qwen2.from_pretrained(tiny), torch.Generator().manual_seed(0)
    examples = [(torch.randint(512, (n,), generator=g).tolist(), None) for n in (7, 12, 9, 15)]
    args = SimpleNamespace(rank=4, mode=mode, calibration=None, seed=0)
    add_corda_adapters(SimpleNamespace(args=args, model=model, examples=examples))
    return model


@pytest.mark.parametrize("mode", ["keep", "learn"])
def test_corda_starts_from_the_base_and_folds_into_its_weights(tiny, mode):
    base, ids = Qwen2.from_pretrained(tiny), torch.arange(5, 15)[None]
    model = corda_model(tiny, mode=mode)
    torch.testing.assert_close(model(ids), base(ids), rtol=1e-4, atol=1e-4)
    adapters = [module for module in model.modules() if isinstance(module, LoRA)]
    assert len(adapters) == 14 and all(x.B.norm() > 0.01 for x in adapters)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    with torch.no_grad():
        for x in adapters:
            x.B.add_(0.1)
    changed, folded = model(ids), copy.deepcopy(model)
    fold(folded)
    torch.testing.assert_close(folded(ids), changed, rtol=1e-3, atol=1e-4)
    assert list(folded.state_dict()) == list(base.state_dict())


def test_covariances_are_of_the_inputs_and_the_same_in_groups(tiny, monkeypatch):
    model = Qwen2.from_pretrained(tiny)
    layer, seen = model.model["layers"][1].mlp.down_proj, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    (got,) = input_covariances(model, [layer], [[5, 6, 7], [8, 9, 10, 11]])
    hook.remove()
    scaled = [x / x.abs().max() for x in seen]
    torch.testing.assert_close(got, sum(x.T @ x for x in scaled) / 2)
    whole = corda_model(tiny)
    monkeypatch.setattr(corda, "COVARIANCES", 1)  # a block at a time
    for a, b in zip(whole.parameters(), corda_model(tiny).parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_runs(tiny, tmp_path, run, monkeypatch, refused):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    questions = write_lines(tmp_path / "q.jsonl", chats(5, seed=1))
    more = ("--rank", 4, "--mode", "keep", "--calibration", questions)
    whole = check_runs(run, monkeypatch, "variants.corda", tiny, data, tmp_path, *more)
    assert weights(whole).keys() == weights(tiny).keys()
    call = lambda *last: ("variants.corda", *arguments(tiny, data, tmp_path / "o", *last))
    refused("--calibration", *call("--mode", "keep"))
    refused("--mode", *call("--calibration", questions))
    refused("--rank 17", *call("--mode", "learn", "--rank", 17))
    refused("none.jsonl", *call("--mode", "learn", "--calibration", "none.jsonl"))
    refused("--shard", *call("--mode", "learn", "--shard"))
