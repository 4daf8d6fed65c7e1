import functools
import json

import pytest
import torch
from conftest import ROOT, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from core.checkpoint import Checkpoint
from tools import rates, speed
from training import memory


def test_forward_flops_are_those_that_torch_counts():
    m = tiny_model(num_attention_heads=4, num_key_value_heads=2)
    lengths = [7, 12, 5]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        m.head(m.hidden(torch.zeros(1, 24, dtype=torch.long), lengths, at=torch.arange(9)))
    counted = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    matrices = sum(v for k, v in counted.items() if "attention" not in k)
    scores = 2 * 4 * 4 * 8 * (7 * 8 + 12 * 13 + 5 * 6) // 2  # layers x heads x 4 D x pairs
    assert memory.forward_flops(m.config, lengths, 9) == matrices + scores


def test_matmul_rate_is_a_rate():
    assert 1e8 < rates.matmul_rate("cpu", torch.float32, seconds=0.1) < 1e14


def test_training_flops_count_the_kto_pairs(tiny, tmp_path):
    path = tmp_path / "kto.jsonl"
    rows = [{"prompt": "Hello", "completion": "a" * n, "label": n % 2 == 0} for n in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))

    class a:
        mode, ckpt, data, max_len, batch_size = "kto", [tiny], str(path), 64, 4  # noqa: E701

    tokens, supervised, flops, steps = speed.training_flops(a)
    path.write_text("".join(json.dumps(r | {"label": None}) + "\n" for r in rows))
    a.mode = "sft"
    sft_tokens, sft_supervised, sft_flops, sft_steps = speed.training_flops(a)
    assert (tokens, supervised) == (2 * sft_tokens, 2 * sft_supervised)  # the same completions, matched and mismatched
    assert (
        flops == 2 * sft_flops and sum(sft_steps) == sft_flops
    )  # 3 + 1 (step) + 2 (reference) forwards of like length
    assert len(steps) == len(sft_steps) == 1 and sum(steps) == flops * 4 // 6


@pytest.fixture
def short(monkeypatch):
    """The matmul rate is measured for 0.1 s, not 2."""
    monkeypatch.setattr(speed, "matmul_rate", functools.partial(rates.matmul_rate, seconds=0.1))


@pytest.mark.usefixtures("short")
def test_ours_alone(tiny, tmp_path, run):
    path, out = tmp_path / "sft.jsonl", tmp_path / "bench.json"
    path.write_text('{"prompt": "Hello", "completion": "you"}\n' * 4)
    flags = "--steps 2 --batch-size 2 --device cpu --dtype fp32".split()
    code, text, err = run("tools.speed", "sft", "--ckpt", tiny, "--data", path, *flags, "--out", out)
    assert code == 0, err
    assert "of the matmul rate" in text
    measured = json.loads(out.read_text())["runs"]["ours"][0]
    assert len(measured["losses"]) == 2 and 0 < measured["step_s"] < measured["wall_s"] and measured["peak_gb"] > 0


@pytest.mark.usefixtures("short")
def test_another_checkout_is_a_peer(tiny, tmp_path, run):
    path, out = tmp_path / "sft.jsonl", tmp_path / "speed.json"
    path.write_text('{"prompt": "Hello", "completion": "you"}\n' * 2)
    more = ("--steps", 1, "--batch-size", 2, "--device", "cpu", "--dtype", "fp32", "--vs", ROOT, "--out", out)
    code, text, err = run("tools.speed", "sft", "--ckpt", tiny, "--data", path, *more)
    assert code == 0, err
    ours, theirs = (turns[0] for turns in json.loads(out.read_text())["runs"].values())
    assert ours["losses"] == theirs["losses"] and theirs["peak_gb"] > 0.1 and "x its speed" in text


def test_a_peer_of_another_mode_is_refused(tiny, run):
    code, _, err = run("tools.speed", "merge", "--ckpt", tiny, tiny, "--vs", "trl")
    assert code == 2 and "mergekit" in err


def test_merging_is_set_against_a_plain_copy(tmp_path, run, monkeypatch):
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "model_type": "qwen2",
    }
    monkeypatch.setattr(rates, "SEVEN_B", small)
    out = tmp_path / "bench.json"
    for _ in range(2):  # the second time the set is there
        code, text, err = run(
            "tools.speed",
            "merge",
            "--synthetic",
            tmp_path / "set",
            "--method",
            "ties",
            "--scratch",
            tmp_path,
            "--out",
            out,
        )
        assert code == 0, err
    a, b, base = (Checkpoint(tmp_path / "set" / name) for name in ("a", "b", "base"))
    numbers = sum(a.tensor(name).numel() for name in a.names)
    assert a.names == base.names and a.dtype("lm_head.weight") == base.dtype("lm_head.weight") == torch.bfloat16
    assert all(torch.equal(a.tensor(n), b.tensor(n)) and not base.tensor(n).any() for n in a.names)
    assert a.tensor("lm_head.weight").float().std() == pytest.approx(1, rel=0.1)
    found = json.loads(out.read_text())
    assert found["runs"]["ours"][0]["rate"] > 0 and "of the copy rate" in text
    files, written = rates.merge_bytes([*found["settings"]["ckpt"], found["settings"]["base"]], torch.bfloat16)
    assert len(files) == 3 and written == 2 * numbers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "set"]
