"""experiments.steps and related_losses: which arms a study trains, and DPO's pairs."""

import argparse
import json

import pytest

from experiments import steps
from experiments.related_losses import write_pairs


@pytest.fixture
def trained(monkeypatch):
    """The names of the arms that were trained, and the dev scores that they get."""
    names, scores = [], {"sft-1e-5": 0.25, "sft-5e-5": 0.5, "sft-1e-4": 0.5}
    monkeypatch.setattr(steps, "run_step", lambda out, name, command, hidden=(): names.append(name))
    monkeypatch.setattr(steps, "evaluate", lambda args, name, split="test", ckpt="": scores[name])
    return names


def study(tmp_path, *rates):
    return argparse.Namespace(
        out=str(tmp_path), student="s", sft_lrs=[*rates], sft_epochs=2, batch_size=16, seed=0, dtype="bf16"
    )


def test_the_best_rate_of_the_dev_split_and_the_smaller_one_of_two_equals(tmp_path, trained):
    args = study(tmp_path, "1e-4", "1e-5", "5e-5")
    assert steps.choose_lr(args, "sft") == "5e-5"
    assert trained == ["sft-1e-5", "sft-5e-5", "sft-1e-4"]
    chosen = json.loads((tmp_path / "chosen-sft.json").read_text())
    assert chosen == {"lr": "5e-5", "dev": {"1e-5": 0.25, "5e-5": 0.5, "1e-4": 0.5}}


def test_a_single_rate_is_chosen_without_training(tmp_path, trained):
    args = study(tmp_path, "2e-5")
    assert steps.choose_lr(args, "sft") == "2e-5" and trained == []
    steps.train_chosen(args, "sft")
    assert trained == ["sft-2e-5"] and (tmp_path / "sft").readlink().name == "sft-2e-5"


def test_pairs_of_kto_rows(tmp_path):
    rows = [("a", True, "good"), ("b", False, "lonely"), ("a", False, "bad")]
    lines = [{"id": i, "label": label, "prompt": i, "completion": text} for i, label, text in rows]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_pairs(str(tmp_path / "kto.jsonl"), str(tmp_path / "pairs.jsonl"))
    assert json.loads((tmp_path / "pairs.jsonl").read_text()) == {"prompt": "a", "chosen": "good", "rejected": "bad"}


def test_the_words_of_a_command():
    assert steps.command("eval.py", ckpt="c", max_new_tokens=8) == ["eval.py", "--ckpt", "c", "--max-new-tokens", "8"]
    assert steps.command("variants.dft", lr="1e-5") == ["-m", "variants.dft", "--lr", "1e-5"]
    words = steps.command("merge.py search", models=["a", "b"], allow_code_execution=True, aside=0.1)
    assert words == ["merge.py", "search", "--models", "a", "b", "--allow-code-execution", "--aside", "0.1"]
