import json

import pytest
import torch
from conftest import tiny_model

from core.config import parse_config
from tools import gpu, gpu_parts, gpu_training
from tools.memory import raw_config


def test_parts_run_on_a_cpu_and_fill_a_table(tmp_path, run, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {name: (part, 2000) for name, (part, _) in gpu.PARTS.items()})
    out = tmp_path / "gpu.jsonl"
    flags = "--device cpu --small --compile off --dtype fp32 --parts kto headline".split()
    code, text, err = run("tools.gpu", *flags, "--minutes", 99, "--out", out)
    assert code == 0, err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row for row in rows if row["what"] in ("failed", "not run")]
    found = {row["what"]: row["value"] for row in rows}
    assert {"card", "versions", "commit", "command"} <= set(found)
    for what in ("KTO", "KTO, reference pass", "KTO, share of the matmul rate", "KTO, an epoch of 24 examples"):
        assert found[what] > 0
        assert f"| {what} |" in text


def bench(tmp_path, part="test", **changes):
    sizes = gpu_parts.SMALL
    settings = {
        "part": part,
        "device": "cpu",
        "dtype": "fp32",
        "sizes": sizes,
        "out": str(tmp_path / "gpu.jsonl"),
        "folder": str(tmp_path),
        "deadline": 0.0,
        "compile": False,
    }
    return gpu_parts.Bench(**settings | changes)


def results(b):
    with open(b.out, encoding="utf-8") as f:
        return {row["what"]: row["value"] for row in map(json.loads, f)}


def test_correctness_holds_on_a_cpu_and_notices_a_wrong_model(tmp_path, monkeypatch):
    b = bench(tmp_path)
    gpu_training.correctness(b)
    found = results(b)
    assert len(found) == 18 and all(value.startswith("ok") for value in found.values()), found
    monkeypatch.setattr(gpu_training, "recompute", lambda block: block.mlp.down_proj.weight.data.mul_(2))
    gpu_training.check_steps(b, tiny_model(vocab_size=1024))
    wrong = {what for what, value in results(b).items() if value.startswith("WRONG")}
    assert wrong == {
        f"{mode} steps, activation checkpointing, {dtype}" for mode in ("SFT", "KTO") for dtype in ("fp32", "bf16")
    }


def test_single_operations_and_generation_give_numbers(tmp_path):
    b = bench(tmp_path)
    gpu_parts.operations(b)
    gpu_parts.generation(b)
    found = results(b)
    assert len(found) == 3 + 3 * 2 and all(value > 0 for value in found.values())


def test_a_failing_and_a_slow_part_stop_no_other(tmp_path, run):
    args = type("args", (), {"device": "cuda:99", "dtype": "fp32", "compile": "off", "small": True})
    args.out = str(tmp_path / "gpu.jsonl")
    gpu.run_part(args, "machine", 2000)  # no such GPU
    args.device = "cpu"
    gpu.run_part(args, "machine", 0.05)
    rows = gpu.read_rows(args.out)
    assert [row["what"] for row in rows] == ["failed", "failed"]
    assert "cuda:99" in rows[0]["value"] and "limit" in rows[1]["value"]


def test_the_table_of_an_interrupted_run(tmp_path, run, refused):
    path = tmp_path / "gpu.jsonl"
    path.write_text('{"part": "sft", "what": "SFT", "value": 12345.6, "unit": "tokens/s", "note": "a|b"}\n{"part": "kt')
    code, text, _ = run("tools.gpu", "--table", path)
    assert code == 0 and text.splitlines()[2:] == ["| sft | SFT | 12,346 tokens/s | a\\|b |"]
    path.write_text("other\n")
    refused("no results", "tools.gpu", "--table", path)
    refused("was not written by this command", "tools.gpu", "--device", "cpu", "--out", path)


def test_the_measured_lengths_are_natural():
    sizes = gpu_parts.LARGE
    rows = gpu_parts.random_rows(sizes, 2000)
    lengths = torch.tensor([float(len(prompt) + len(completion)) for prompt, completion, _ in rows])
    assert lengths.mean() == pytest.approx(sizes.length, rel=0.05) and lengths.std() > 150
    assert parse_config(raw_config(*sizes.shape)).vocab_size > max(max(row[0]) for row in rows)
