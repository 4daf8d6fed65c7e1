"""Half fine-tuning: counts of each kind, frozen weights to the bit, runs."""

import torch
from conftest import write_lines
from training_runs import chats, feedback, log, weights
from variant_runs import check_runs, check_shard

from variants.half_finetuning import frozen_modules


def test_counts_in_four_blocks():
    names = frozen_modules(4, "0 0")
    assert [sum(kind in name for name in names) for kind in ("self_attn", "mlp", "norm")] == [8, 6, 4]
    for k in range(4):
        own = [name for name in names if name.startswith(f"model.layers.{k}.")]
        assert len(set(own)) == len(own)
        assert sum("self_attn" in name for name in own) == 2 and sum("norm" in name for name in own) == 1
        assert sum("mlp" in name for name in own) in (1, 2)
    assert names == frozen_modules(4, "0 0") != frozen_modules(4, "0 1")


def test_runs(tiny, tmp_path, run, monkeypatch):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    whole = check_runs(run, monkeypatch, "variants.half_finetuning", tiny, data, tmp_path, "--weight-decay", 0.1)
    base, after, frozen = weights(tiny), weights(whole), frozen_modules(2, "0 0")
    for name in base:
        assert torch.equal(base[name], after[name]) == (name.rpartition(".")[0] in frozen), name
    check_shard("variants.half_finetuning", tiny, data, tmp_path, whole, "--weight-decay", 0.1)


def test_kto_trains_the_other_half(tiny, tmp_path, run, monkeypatch):
    data, flags = write_lines(tmp_path / "d.jsonl", feedback(13)), ("--round", 1, "--weight-decay", 0.1)
    out = check_runs(run, monkeypatch, "variants.half_finetuning", tiny, data, tmp_path, *flags, before=["kto"])
    base, after, frozen = weights(tiny), weights(out), frozen_modules(2, "0 1")
    for name in base:
        assert torch.equal(base[name], after[name]) == (name.rpartition(".")[0] in frozen), name
    assert "rewards/margins" in log(out)[0]
