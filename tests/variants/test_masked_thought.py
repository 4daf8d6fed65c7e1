"""Masked thought: the rate, what is corrupted, SFT as its special case, runs."""

from argparse import Namespace

import pytest
import torch
from conftest import write_lines
from training_runs import chats, log, same_run
from variant_runs import arguments, check_runs, check_shard

from core.checkpoint import Checkpoint
from core.tokenizer import Tokenizer
from model import Qwen2
from train_sft import StepBatch
from variants.masked_thought import corrupt, mask_rate, micro_loss, ordinary_ids


def test_rate_by_hand():
    got = [mask_rate(step, 100, 0.4) for step in (0, 33, 66, 67, 100)]
    assert got == pytest.approx([0, 0.197015, 0.394030, 0.4, 0.4], abs=1e-6)


def test_only_supervised_ids_are_corrupted():
    ids, supervised = list(range(1000, 1400)), [False] * 200 + [True] * 200
    assert corrupt((ids, supervised), 0.0, [7], "a") == ids
    assert corrupt((ids, supervised), 1.0, [7], "a") == ids[:200] + [7] * 200
    some = corrupt((ids, supervised), 0.4, [7], "a")
    assert some[:200] == ids[:200] and 50 < some.count(7) < 110
    assert some == corrupt((ids, supervised), 0.4, [7], "a") != corrupt((ids, supervised), 0.4, [7], "b")


def test_the_model_reads_the_corrupted_answer_and_predicts_the_original(tiny):
    model, (ids, supervised) = Qwen2.from_pretrained(tiny), ([5, 6, 7, 8, 9], [False, False, True, True, True])
    args = Namespace(seed=0, p_max=0.999, rise=0)
    batch = StepBatch(9, 10, [0], [(ids, supervised)], 3, [300])  # 300 is the only ordinary token
    logps = model(torch.tensor([[5, 6, 300, 300]]))[0].log_softmax(-1)
    want = -sum(logps[t, target] for t, target in ((1, 7), (2, 8), (3, 9))) / 3
    assert micro_loss(model, batch, [0], args).item() == pytest.approx(want.item(), rel=1e-5)


def test_control_tokens_are_never_drawn(tiny):
    tokenizer = Tokenizer(Checkpoint(tiny))
    ids = ordinary_ids(tokenizer)
    assert not {0, 1, 2} & set(ids) and len(ids) == tokenizer.backend.get_vocab_size() - 3


def test_runs(tiny, tmp_path, run, monkeypatch, refused):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    whole = check_runs(run, monkeypatch, "variants.masked_thought", tiny, data, tmp_path)
    check_shard("variants.masked_thought", tiny, data, tmp_path, whole)
    assert run("variants.masked_thought", *arguments(tiny, data, tmp_path / "none", "--p-max", 0))[0] == 0
    assert run("train_sft", *arguments(tiny, data, tmp_path / "sft"))[0] == 0
    same_run(tmp_path / "none", tmp_path / "sft")
    a, b = log(whole), log(tmp_path / "sft")
    assert a[0]["loss"] == pytest.approx(b[0]["loss"]) and a[-1]["loss"] != pytest.approx(b[-1]["loss"], rel=1e-3)
    refused("--p-max", "variants.masked_thought", *arguments(tiny, data, tmp_path / "o", "--p-max", 1.5))
