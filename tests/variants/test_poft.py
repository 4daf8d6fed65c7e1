"""PoFT: hand-computed numbers, means over the answer, runs."""

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines
from training_runs import chats, log
from variant_runs import arguments, check_resume_refuses, check_runs, check_shard

from core.checkpoint import Checkpoint
from core.tokenizer import Tokenizer
from model import Qwen2
from training.logps import supervised_logps
from variants.poft import poft_loss


def test_loss_and_gradient_by_hand():
    logps = [torch.tensor([-0.5, -1.0, -1.5], requires_grad=True), torch.tensor([-2.0, -0.4], requires_grad=True)]
    others = torch.tensor([[-0.8, -1.0, -1.2], [-1.6, -1.4, -2.4]]).mean(1)
    losses = poft_loss(torch.stack([x.mean() for x in logps]), others)
    losses.mean().backward()
    assert losses.tolist() == pytest.approx([0.693147, 0.437488], abs=1e-6)
    assert logps[0].grad.tolist() == pytest.approx([-0.083333] * 3, abs=1e-6)  # tau / T / n, tau = 0.5
    assert logps[1].grad.tolist() == pytest.approx([-0.088586] * 2, abs=1e-6)  # tau = 0.354344


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    found = [str(tmp_path_factory.mktemp("other") / str(seed)) for seed in (1, 2)]
    for seed, out in enumerate(found, 1):
        tiny_model(seed=seed).save(out, tiny_files())
    return found


def test_means_are_over_the_answer_and_over_the_models(tiny, tmp_path, run, others):
    records = chats(1)
    data = write_lines(tmp_path / "d.jsonl", records)
    more = ("--batch-size", 1, "--max-len", 512, "--others", *others)
    code, _, err = run("variants.poft", *arguments(tiny, data, tmp_path / "o", *more))
    assert code == 0, err
    example = Tokenizer(Checkpoint(tiny)).chat_ids(records[0]["messages"])
    means = [supervised_logps(Qwen2.from_pretrained(c), [example])[0].mean() for c in (tiny, *others)]
    want = poft_loss(means[0][None], (means[1] + means[2])[None] / 2)
    assert log(tmp_path / "o")[0]["loss"] == pytest.approx(want.item(), rel=1e-5)


def test_runs(tiny, tmp_path, run, monkeypatch, others, refused):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    whole = check_runs(run, monkeypatch, "variants.poft", tiny, data, tmp_path, "--others", *others)
    check_shard("variants.poft", tiny, data, tmp_path, whole, "--others", *others)
    refused("--others", "variants.poft", *arguments(tiny, data, tmp_path / "o"))
    files = tiny_files()
    files["tokenizer.json"] = files["tokenizer.json"].replace("<|endoftext|>", "<|end|>")
    other = str(tmp_path / "foreign")
    tiny_model().save(other, files)
    refused(
        ["foreign", "tokenizer differs"], "variants.poft", *arguments(tiny, data, tmp_path / "o", "--others", other)
    )


def test_resume_refuses_another_model_under_the_same_name(tiny, tmp_path, run, monkeypatch, refused):
    check_resume_refuses(run, monkeypatch, refused, "variants.poft", "--others", "other_fingerprints", tiny, tmp_path)
