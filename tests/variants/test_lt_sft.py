"""LT-SFT: the mask and a step by hand, masked weights to the bit, runs."""

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines
from training_runs import chats, weights
from variant_runs import arguments, check_resume_refuses, check_runs

from variants import lt_sft
from variants.lt_sft import lottery_masks

START, MOVED = torch.tensor([0.5, -0.2, 0.1, 0.9]), torch.tensor([0.6, -0.25, 0.4, 0.88])


def test_mask_and_step_by_hand():
    mask = lottery_masks({"w": START}, {"w": MOVED}, 2)["w"]
    assert mask.tolist() == [True, False, True, False]
    w = START.clone().requires_grad_()
    w.register_hook(lambda grad: grad * mask)
    (w * torch.tensor([0.2, -0.1, 0.4, 0.3])).sum().backward()
    assert (w - 0.1 * w.grad).tolist() == pytest.approx([0.48, -0.2, 0.06, 0.9])


def test_the_threshold_is_of_all_tensors_together():
    start, moved = {"a": START[:2], "b": START[2:]}, {"a": MOVED[:2], "b": MOVED[2:]}
    masks = lottery_masks(start, moved, 1)
    assert masks["a"].tolist() == [False, False] and masks["b"].tolist() == [True, False]


def test_masks_over_several_chunks(monkeypatch):
    """With chunks of 7 weights, and with equal distances at the threshold, the masks are those of one sort of all."""
    monkeypatch.setattr(lt_sft, "CHUNK", 7)
    g = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=g) for name, shape in [("a", (5, 8)), ("b", (3,)), ("c", (40, 50))]}
    moved = {name: t + torch.randint(-9, 10, t.shape, generator=g) / 8 for name, t in start.items()}
    every = torch.cat([(moved[name] - start[name]).abs().flatten() for name in start]).sort(descending=True).values
    for k in (1, 37, 900, int((every > 0).sum())):
        for name, mask in lottery_masks(start, moved, k).items():
            assert torch.equal(mask, (moved[name] - start[name]).abs() >= every[k - 1])


def test_runs(tiny, tmp_path, run, monkeypatch, refused):
    data, moved = write_lines(tmp_path / "d.jsonl", chats(13)), str(tmp_path / "moved")
    assert run("train_sft", *arguments(tiny, data, moved))[0] == 0
    more = ("--moved", moved, "--density", 0.01)
    whole = check_runs(run, monkeypatch, "variants.lt_sft", tiny, data, tmp_path, *more)
    base, first, after = weights(tiny), weights(moved), weights(whole)
    names = [name for name in base if "norm" not in name]
    n = sum(base[name].numel() for name in names)
    masks = lottery_masks({name: base[name] for name in names}, first, int(0.01 * n))
    changed = {name: base[name] != after[name] for name in base}
    assert all(not (changed[name] & ~masks[name]).any() for name in names)
    assert not any(changed[name].any() for name in base if name not in names)
    assert sum(int(c.sum()) for c in changed.values()) > 0.9 * int(0.01 * n)
    call = lambda *last: ("variants.lt_sft", *arguments(tiny, data, tmp_path / "o", *last))
    refused("--shard", *call(*more, "--shard"))
    refused("--weight-decay", *call(*more, "--weight-decay", 0.1))
    refused("--moved", *call())
    refused(["--moved", "fewer than"], *call("--moved", tiny))  # all weights tie at 0: the mask would hold them all
    other = str(tmp_path / "other")
    tiny_model(intermediate_size=48).save(other, tiny_files())
    refused(["other", "do not fit"], *call("--moved", other))
    files = tiny_files()
    files["tokenizer.json"] = files["tokenizer.json"].replace("<|endoftext|>", "<|end|>")
    tiny_model().save(str(tmp_path / "foreign"), files)
    refused(["foreign", "tokenizer differs"], *call("--moved", tmp_path / "foreign"))


def test_resume_refuses_another_first_run(tiny, tmp_path, run, monkeypatch, refused):
    check_resume_refuses(run, monkeypatch, refused, "variants.lt_sft", "--moved", "moved_fingerprint", tiny, tmp_path)
