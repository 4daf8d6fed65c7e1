"""DPO: hand-computed numbers, the gradient, bad input, runs."""

import pytest
import torch
from conftest import write_lines
from training_runs import feedback, log
from variant_runs import arguments, check_runs, check_shard, pairs

from core.tokenizer import Tokenizer
from variants.dpo import dpo_loss

CHOSEN, REJECTED = torch.tensor([-10.0, -8.0]), torch.tensor([-12.0, -7.0])
REF_CHOSEN, REF_REJECTED = torch.tensor([-11.0, -8.5]), torch.tensor([-11.5, -7.5])


def test_loss_by_hand():
    losses, rewards = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1)
    assert losses.tolist() == pytest.approx([0.620957, 0.693147], abs=1e-6)
    assert rewards.flatten().tolist() == pytest.approx([0.1, -0.05, 0.05, 0.05], abs=1e-6)
    smoothed, _ = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1, 0.1)
    assert smoothed.tolist() == pytest.approx([0.635957, 0.693147], abs=1e-6)


def test_gradient_pushes_the_two_apart():
    chosen = CHOSEN.clone().requires_grad_()
    rejected = REJECTED.clone().requires_grad_()
    losses, rewards = dpo_loss(chosen, rejected, REF_CHOSEN, REF_REJECTED, 0.1)
    losses.sum().backward()
    want = [-0.1 * (1 - 1 / (1 + torch.tensor(-0.1 * d).exp().item())) for d in (1.5, 0)]  # -beta sigmoid(-beta d)
    assert chosen.grad.tolist() == pytest.approx(want) and torch.equal(rejected.grad, -chosen.grad)
    assert not rewards.requires_grad


def test_runs(tiny, tmp_path, run, monkeypatch):
    data = write_lines(tmp_path / "d.jsonl", pairs(13))
    whole = check_runs(run, monkeypatch, "variants.dpo", tiny, data, tmp_path, "--eval-data", data, "--eval-every", 2)
    first, *_, last = log(whole)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)  # the policy is the reference
    assert last["eval_rewards/margins"] > 0.1 and "eval_loss" not in first
    assert list(first)[:6] == ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"]
    check_shard("variants.dpo", tiny, data, tmp_path, whole)


def test_labelled_completions_of_one_prompt_are_pairs(tiny, tmp_path, run):
    """The lines of kto.jsonl in any order train as the same pairs. A reply without a partner is left out."""
    rows = feedback(12)
    chosen, rejected = rows[::2], rows[1::2]
    paired = [
        {"prompt": c["prompt"], "chosen": c["completion"], "rejected": r["completion"]}
        for c, r in zip(chosen, rejected)
    ]
    alone = [{"prompt": "alone", "completion": "a", "label": True}, chosen[0] | {"label": False, "completion": "again"}]
    files = {"pairs": paired, "kto": rows, "shuffled": [*rejected, *alone, *chosen]}
    files["tags"] = [{"kto_tag": row["label"], **{k: v for k, v in row.items() if k != "label"}} for row in rows]
    for name, lines in files.items():
        data = write_lines(tmp_path / f"{name}.jsonl", lines)
        code, text, err = run("variants.dpo", *arguments(tiny, data, tmp_path / name, "--no-shuffle"))
        assert code == 0 and "6 prompts with their replies" in text, err
        assert ("note: 2 labelled completions are left out" in text) == (name == "shuffled")
        assert [s["loss"] for s in log(tmp_path / name)] == [s["loss"] for s in log(tmp_path / "pairs")]


def test_bad_input_ends_in_one_line(tiny, tmp_path, refused):
    unpaired = write_lines(tmp_path / "unpaired.jsonl", feedback(4)[::2])
    refused(["unpaired.jsonl", "no pair", "train_kto.py"], "variants.dpo", *arguments(tiny, unpaired, tmp_path / "o"))
    labelled = write_lines(tmp_path / "labelled.jsonl", [*feedback(2), feedback(2)[0] | {"label": 1}])
    refused(["labelled.jsonl:3", "label is 1"], "variants.dpo", *arguments(tiny, labelled, tmp_path / "o"))
    plain = write_lines(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": "b"}])
    refused(["plain.jsonl:1", "rejected"], "variants.dpo", *arguments(tiny, plain, tmp_path / "o"))
    grouped = write_lines(tmp_path / "grouped.jsonl", [{"prompt": "a", "completions": ["b", "c"], "rewards": [1, 0]}])
    refused(["grouped.jsonl:1", "variants.adpo"], "variants.dpo", *arguments(tiny, grouped, tmp_path / "o"))
    data = write_lines(tmp_path / "d.jsonl", pairs(4))
    refused("--label-smoothing", "variants.dpo", *arguments(tiny, data, tmp_path / "o", "--label-smoothing", 0.5))
    refused("max-len", "variants.dpo", *arguments(tiny, data, tmp_path / "o", "--max-len", 2))


def test_cut_replies_and_dropped_prompts_are_counted(tiny, tmp_path, run):
    long = {"prompt": "a", "chosen": "b c " * 60, "rejected": "d"}
    data = write_lines(tmp_path / "d.jsonl", [*pairs(4), long, long | {"prompt": "a " * 100}])
    tok = Tokenizer(tiny)
    n = len(tok.prompt_ids([{"role": "user", "content": "a"}])) + len(tok.completion_ids(long["chosen"])) - 64
    code, text, err = run("variants.dpo", *arguments(tiny, data, tmp_path / "o", "--max-len", 64, "--eval-data", data))
    assert code == 0, err
    for what in ("", "held-out "):
        assert f"5 {what}prompts with their replies, 1 dropped (the prompt fills 64 tokens)\n" in text
        assert f"1 of 10 {what}replies cut to 64 tokens (--max-len): {n} tokens lost; 1 examples lost" in text
