"""Contrastive generation: scores by hand, novelty of whole texts, what a fine-tune was taught, refusals."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines
from training_runs import perturbed

from core.checkpoint import Checkpoint
from core.tokenizer import Tokenizer
from model import Qwen2
from variants.novelty import contrastive_scores, write_texts

TUNED, BASE = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log(), torch.tensor([0.6, 0.1, 0.1, 0.2]).double().log()


def test_scores_by_hand():
    scores = contrastive_scores(TUNED, BASE, 0.0999)
    assert scores.tolist() == pytest.approx([-0.182, 1.099, 0.405, -1.386], abs=1e-3)
    assert scores.softmax(-1).tolist() == pytest.approx([0.149, 0.537, 0.269, 0.045], abs=1e-3)
    assert contrastive_scores(TUNED, BASE, 0.5).isfinite().tolist() == [True, True, False, False]


def test_the_bound_is_relative_to_the_tuned_models_best():
    """Not an absolute probability, and not the base's: a rare token that the base finds rarer still stays out."""
    tuned = torch.tensor([[0.02] * 50, [0.98] + [0.02 / 49] * 49]).log()
    base = torch.full((2, 50), 0.02).log()
    kept = contrastive_scores(tuned, base, 0.1).isfinite().sum(-1)
    assert kept.tolist() == [50, 1]


@pytest.mark.parametrize("plain", [False, True])
def test_novelty_is_the_log_ratio_of_the_whole_text(tiny, plain):
    tuned, base, tokenizer = tiny_model(seed=1), Qwen2.from_pretrained(tiny), Tokenizer(tiny)
    prompt = [tokenizer.prefix] if plain else tokenizer.prompt_ids([{"role": "user", "content": "Hello"}])
    uniform = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    stops = {*range(0, 500, 7)}
    found = write_texts(tuned, base, prompt, stops, uniform, 0.1, 1.0)
    assert len({tuple(ids) for ids, _ in found}) > 1 and min(len(ids) for ids, _ in found) < 12
    assert not any(token in stops for ids, _ in found for token in ids)
    for ids, novelty in found:
        ends = stops if len(ids) < 12 else [None]  # the end token that was drawn is not told; one of them fits
        ratios = []
        for end in ends:
            whole = torch.tensor([prompt + ids + ([] if end is None else [end])])
            logps = [model(whole[:, :-1])[0].log_softmax(-1) for model in (tuned, base)]
            gained = [x.gather(1, whole[0, 1:, None])[len(prompt) - 1 :].sum().item() for x in logps]
            ratios.append(gained[0] - gained[1])
        assert min(abs(ratio - novelty) for ratio in ratios) < 1e-3


def test_equal_models_have_no_novelty(tiny):
    model = Qwen2.from_pretrained(tiny)
    found = write_texts(model, model, [1, 2, 3], set(), torch.rand(3, 8), 0.1, 1.0)
    assert all(len(ids) == 8 and novelty == 0 for ids, novelty in found)


def lines(path):
    return [json.loads(text) for text in Path(path).read_text().splitlines()]


def test_the_texts_show_what_was_taught(tiny, tmp_path, run):
    taught, out = "the lazy dog", tmp_path / "tuned"
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "Write something.", "completion": taught}] * 4)
    more = ("--lr", 3e-3, "--max-steps", 40, "--warmup", 0, "--batch-size", 4)
    assert run("train_sft", "--ckpt", tiny, "--data", data, "--out", out, *more)[0] == 0
    both = ("--ckpt", out, "--base", tiny, "--samples", 6, "--max-new-tokens", 16)
    code, printed, err = run("variants.novelty", *both, "--out", tmp_path / "a.jsonl")
    assert code == 0, err
    found = lines(tmp_path / "a.jsonl")
    assert found[0]["text"] == taught and found[0]["novelty"] > 10 and taught in printed
    assert [line["novelty"] for line in found] == sorted((line["novelty"] for line in found), reverse=True)
    assert f"generate.py --ckpt {tiny} --prompt 'Write something.'" in printed
    code, _, err = run("variants.novelty", *both, "--out", tmp_path / "b.jsonl", "--batch-size", 4)
    assert code == 0, err
    again = lines(tmp_path / "b.jsonl")
    assert sorted(line["text"] for line in again) == sorted(line["text"] for line in found)
    assert [line["novelty"] for line in again] == pytest.approx([line["novelty"] for line in found], abs=1e-3)
    assert run("variants.novelty", *both, "--out", tmp_path / "b.jsonl", "--plain")[0] == 0, "its own file is replaced"


def test_refusals(tiny, tmp_path, refused):
    call = lambda base, *more: ("variants.novelty", "--ckpt", tiny, "--base", base, "--out", tmp_path / "o", *more)
    files = tiny_files()
    files["tokenizer.json"] = files["tokenizer.json"].replace("<|endoftext|>", "<|end|>")
    tiny_model().save(str(tmp_path / "foreign"), files)
    refused(["foreign", "tokenizer differs"], *call(tmp_path / "foreign"))
    tiny_model(vocab_size=520).save(str(tmp_path / "wide"), Checkpoint(tiny).files)
    refused(["wide", "rows"], *call(tmp_path / "wide"))
    refused("--alpha", *call(tiny, "--alpha", 0))
    refused("nowhere", *call(tmp_path / "nowhere"))
    refused(["diverged", "not finite"], *call(perturbed(tiny, 1e30, str(tmp_path / "diverged"))))
    refused("no room", *call(tiny, "--prompt", "word " * 2000))
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").write_text("mine")
    refused("not written by this command", *call(tiny))
    assert (tmp_path / "o").read_text() == "mine"
