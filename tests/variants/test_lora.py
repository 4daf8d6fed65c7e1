"""LoRA: numbers by hand, the model at the start, folding, runs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import write_lines
from training_runs import chats, weights
from variant_runs import arguments, check_runs

from model import Qwen2
from variants import lora
from variants.lora import LoRA, add_adapters, corda_split, fold, input_covariances, lora_weight


def test_weight_by_hand():
    A, B = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    got = lora_weight(torch.ones(2, 2), A, B, alpha=4)  # alpha / r = 2, B A = [[3, 6], [1, 3]]
    assert got.tolist() == [[7, 13], [3, 7]]


def test_folding_changes_nothing_and_the_start_is_the_base(tiny):
    model, ids = Qwen2.from_pretrained(tiny), torch.arange(5, 15)[None]
    names, base = list(model.state_dict()), model(ids)
    add_adapters(SimpleNamespace(args=SimpleNamespace(rank=4, alpha=8.0, corda=None), model=model))
    assert torch.equal(model(ids), base)
    adapters = [module for module in model.modules() if isinstance(module, LoRA)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(adapters) == 14 and trained == sum(x.A.numel() + x.B.numel() for x in adapters)
    with torch.no_grad():
        for x in adapters:
            x.B.normal_()
    changed, folded = model(ids), copy.deepcopy(model)
    fold(folded)
    assert list(folded.state_dict()) == names
    torch.testing.assert_close(folded(ids), changed, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(changed, base, atol=0.1)


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


def corda_model(tiny, corda="learn"):
    model, g = Qwen2.from_pretrained(tiny), torch.Generator().manual_seed(0)
    examples = [(torch.randint(512, (n,), generator=g).tolist(), None) for n in (7, 12, 9, 15)]
    args = SimpleNamespace(rank=4, corda=corda, calibration=None, seed=0)
    add_adapters(SimpleNamespace(args=args, model=model, examples=examples))
    return model


@pytest.mark.parametrize("corda", ["keep", "learn"])
def test_corda_starts_from_the_base_and_folds_into_its_weights(tiny, corda):
    base, ids = Qwen2.from_pretrained(tiny), torch.arange(5, 15)[None]
    model = corda_model(tiny, corda=corda)
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
    monkeypatch.setattr(lora, "COVARIANCES", 1)  # a block at a time
    for a, b in zip(whole.parameters(), corda_model(tiny).parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_runs_of_corda(tiny, tmp_path, run, monkeypatch, refused):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    questions = write_lines(tmp_path / "q.jsonl", chats(5, seed=1))
    more = ("--rank", 4, "--corda", "keep", "--calibration", questions)
    whole = check_runs(run, monkeypatch, "variants.lora", tiny, data, tmp_path, *more)
    assert weights(whole).keys() == weights(tiny).keys()
    call = lambda *last: ("variants.lora", *arguments(tiny, data, tmp_path / "o", *last))
    refused("--calibration", *call("--corda", "keep"))
    refused("--corda", *call("--calibration", questions))
    refused("--rank 17", *call("--corda", "learn", "--rank", 17))
    refused("none.jsonl", *call("--corda", "learn", "--calibration", "none.jsonl"))


def test_runs(tiny, tmp_path, run, monkeypatch, refused):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    whole = check_runs(run, monkeypatch, "variants.lora", tiny, data, tmp_path, "--rank", 4)
    base, after = weights(tiny), weights(whole)
    assert base.keys() == after.keys()
    moved = {name for name in base if not torch.equal(base[name], after[name])}
    assert moved == {name for name in base if name.endswith("proj.weight")}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.linalg.matrix_rank(after[name] - base[name], rtol=1e-3) <= 4
    refused("--shard", "variants.lora", *arguments(tiny, data, tmp_path / "o", "--shard"))
    refused("--rank", "variants.lora", *arguments(tiny, data, tmp_path / "o", "--rank", 0))
