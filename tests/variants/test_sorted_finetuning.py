"""Sorted fine-tuning: hand-computed numbers, exits as models of their own, SFT as its special case, runs."""

import pytest
import torch
from conftest import write_lines
from training_runs import chats, same_run
from variant_runs import arguments, check_runs

from model import Qwen2
from training.logps import supervised_logps
from variants.sorted_finetuning import default_exits, export_exit, logps_at_exits, sorted_loss


def test_loss_by_hand():
    exits = [torch.tensor(x) for x in ([-1.2, -0.7], [-0.9, -0.5], [-0.4, -0.3])]
    assert sorted_loss(exits, 2).item() == pytest.approx(0.666667, abs=1e-6)  # the sum would be 2
    assert default_exits(24) == [8, 12, 16, 20]
    assert default_exits(40) == [12, 16, 20, 24, 28, 32, 36]  # the paper's


def test_an_exit_is_the_exported_model(tiny, tmp_path):
    examples = [([5, 6, 7, 8], [False, True, True, True]), ([9, 4, 6], [False, False, True])]
    first, whole = logps_at_exits(Qwen2.from_pretrained(tiny), examples, [1])
    export_exit(tiny, 1, str(tmp_path / "one"))
    small = Qwen2.from_pretrained(str(tmp_path / "one"))
    assert len(small.model["layers"]) == 1
    torch.testing.assert_close(first, supervised_logps(small, examples)[0])
    torch.testing.assert_close(whole, supervised_logps(Qwen2.from_pretrained(tiny), examples)[0])
    assert not torch.allclose(first, whole, atol=0.1)


def test_runs(tiny, tmp_path, run, monkeypatch, refused):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    whole = check_runs(
        run, monkeypatch, "variants.sorted_finetuning", tiny, data, tmp_path, "--export", 1, "--exits", 1
    )
    assert len(Qwen2.from_pretrained(f"{whole}-1").model["layers"]) == 1
    for name, more in ("variants.sorted_finetuning", ("--exits", 2)), ("train_sft", ()):
        assert run(name, *arguments(tiny, data, tmp_path / name, *more))[0] == 0
    same_run(tmp_path / "variants.sorted_finetuning", tmp_path / "train_sft")
    call = lambda *last: ("variants.sorted_finetuning", *arguments(tiny, data, tmp_path / "o", *last))
    refused("--shard", *call("--shard"))
    refused(["--exits 3", "2 blocks"], *call("--exits", 3))
    refused(["--export 1", "exits are 2"], *call("--exits", 2, "--export", 1))
