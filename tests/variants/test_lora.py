"""LoRA: numbers by hand, the model at the start, folding, runs."""

import copy
from types import SimpleNamespace

import torch
from conftest import write_lines
from training_runs import chats, weights
from variant_runs import arguments, check_runs

from model import Qwen2
from variants.lora import LoRA, add_adapters, fold, lora_weight


def test_weight_by_hand():
    A, B = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    got = lora_weight(torch.ones(2, 2), A, B, alpha=4)  # alpha / r = 2, B A = [[3, 6], [1, 3]]
    assert got.tolist() == [[7, 13], [3, 7]]


def test_folding_changes_nothing_and_the_start_is_the_base(tiny):
    model, ids = Qwen2.from_pretrained(tiny), torch.arange(5, 15)[None]
    names, base = list(model.state_dict()), model(ids)
    add_adapters(SimpleNamespace(args=SimpleNamespace(rank=4, alpha=8.0), model=model))
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
