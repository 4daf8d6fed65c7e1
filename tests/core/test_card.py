"""Model cards: the front matter that the hub reads, escaped names, the base's license."""

import huggingface_hub
import pytest
from conftest import write_lines

from core.card import base_license, dataset_id, hub_id, model_card, readme_license, table_row


def parse(card):
    return huggingface_hub.ModelCard(card).data.to_dict()


def test_a_cell_of_a_table_stays_one_cell():
    assert table_row(["a|b", 1, "two\nlines"]) == "| a\\|b | 1 | two lines |"


def test_the_hub_reads_the_front_matter():
    card = model_card(
        "sft",
        "Fine-tuned.",
        ["Qwen/Qwen2-0.5B-Instruct"],
        "finetune",
        {"lr": 1e-6, "note": "a | b"},
        ["hf://datasets/openai/gsm8k/main/train.parquet", "data/sft.jsonl"],
        {"loss": 0.5},
        {"torch": "2.13.0"},
    )
    data = parse(card)
    assert data["base_model"] == ["Qwen/Qwen2-0.5B-Instruct"] and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["openai/gsm8k"] and data["library_name"] == "transformers" and "license" not in data
    assert "| note | a \\| b |" in card and "`data/sft.jsonl`" in card and "from_pretrained" in card


@pytest.mark.parametrize("name", ['x": y', "# c", "a: b", "- x", "'", "\u2028", "---\nlicense: mit\n---"])
def test_odd_names_do_not_break_the_front_matter(name, tmp_path):
    card = model_card("out", "Merged.", [name, "Qwen/Qwen2-0.5B"], "merge", {}, [f"hf://datasets/o/{name.strip()}/f"])
    data = parse(card)
    assert data["base_model"] == ["Qwen/Qwen2-0.5B"] and "license" not in data


def test_a_local_base_gives_its_license_and_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "models/base"
    base.mkdir(parents=True)
    assert readme_license(str(base)) is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\nlicense: mit\n")
    assert readme_license(str(base)) == "apache-2.0" and hub_id("models/base") is None
    data = parse(model_card("o", "Done.", ["models/base"], "finetune", {}))
    assert data["license"] == "apache-2.0" and "base_model" not in data and "base_model_relation" not in data
    assert hub_id("a/b/c") is None and dataset_id("data/x.jsonl") is None


def test_a_hub_id_gives_the_license_of_its_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--Qwen--Tiny"
    snapshot = repo / "snapshots/abc"
    for path, text in ((repo / "refs/main", "abc"), (snapshot / "config.json", "{}")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    card = lambda: parse(model_card("o", "Done.", ["Qwen/Tiny"], "finetune", {}))
    assert "license" not in card()  # a repository without README.md
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert card()["license"] == "apache-2.0" and card()["base_model"] == ["Qwen/Tiny"]
    assert [base_license(name) for name in ("Qwen/Other", "no/such/folder", "a/b--c", "")] == [None] * 4


def test_training_and_merging_write_cards_and_keep_the_users(tiny, tmp_path, run):
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    sft, fused = tmp_path / "sft", tmp_path / "fused"
    train = ("train_sft", "--ckpt", tiny, "--data", data, "--out", sft, "--max-steps", 1, "--warmup", 0)
    merge = ("merge", "--method", "linear", "--models", sft, tiny, "--out", fused)
    assert run(*train)[0] == run(*merge)[0] == 0
    card = (sft / "README.md").read_text()
    assert parse(card)["tags"] == ["qwen2", "post-training", "finetune"] and "| lr | 1e-06 |" in card
    assert "| loss |" in card and data in card
    assert "Merged by linear" in (fused / "README.md").read_text() and "sha256 of" in (fused / "README.md").read_text()
    (fused / "README.md").write_text("my own words")
    assert run(*merge)[0] == 0 and (fused / "README.md").read_text() == "my own words"
    assert run(*train)[0] == 0 and (sft / "README.md").read_text() != ""
