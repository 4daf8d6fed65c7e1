"""ADPO: hand-computed numbers, ADPO of pairs is DPO, bad groups, runs."""

import math

import pytest
import torch
from conftest import write_lines
from test_dpo import CHOSEN, REF_CHOSEN, REF_REJECTED, REJECTED
from training_runs import log, sentence, update_error, weights
from variant_runs import arguments, check_runs, check_shard, pairs

from variants import adpo, dpo
from variants.adpo import adpo_loss, adpo_target
from variants.dpo import dpo_loss


def test_adpo_by_hand():
    logps, anchors = torch.tensor([-10.0, -12, -9, -11]), torch.tensor([-10.5, -11, -9.5, -11])
    q = adpo_target(torch.tensor([1.0, 0, 1, 0]), 0.5)
    assert q.tolist() == pytest.approx([0.484824, 0.015176, 0.484824, 0.015176], abs=1e-6)
    loss = adpo_loss(logps, anchors, q, 1.0).item()
    assert loss == pytest.approx(1.070508, abs=1e-6)
    assert loss + (q * q.log()).sum().item() == pytest.approx(0.241400, abs=1e-6)  # KL(q || p)
    centred = adpo_target(torch.tensor([1.0, 0, 1, 0]), 0.5, standardise=False)
    assert centred[:2].tolist() == pytest.approx([0.440399, 0.059601], abs=1e-6)
    assert adpo_loss(logps, anchors, centred, 1.0).item() == pytest.approx(1.159360, abs=1e-6)
    assert adpo_target(torch.tensor([2.0, 2, 2, 2]), 0.5).tolist() == [0.25] * 4


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_adpo_of_pairs_is_dpo_with_label_smoothing(eps):
    losses, _ = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1, eps)
    logps, refs = torch.stack((CHOSEN, REJECTED), 1), torch.stack((REF_CHOSEN, REF_REJECTED), 1)
    groups = [adpo_loss(l, r, torch.tensor([1 - eps, eps]), 10.0) for l, r in zip(logps, refs)]
    assert torch.stack(groups).tolist() == pytest.approx(losses.tolist(), abs=1e-6)
    if eps:
        entropy = -(eps * math.log(eps) + (1 - eps) * math.log(1 - eps))
        assert torch.stack(groups).mean().item() - entropy == pytest.approx(0.339469, abs=1e-6)


def groups(n):
    """n groups of two to four completions with rewards."""
    g = torch.Generator().manual_seed(7)
    sizes = [2 + i % 3 for i in range(n)]
    return [
        {
            "prompt": sentence(g, 2, 12),
            "completions": [sentence(g, 1, 20) for _ in range(k)],
            "rewards": torch.rand(k, generator=g).tolist(),
        }
        for k in sizes
    ]


def test_runs_of_groups(tiny, tmp_path, run, monkeypatch):
    data = write_lines(tmp_path / "d.jsonl", groups(10) + pairs(3))
    more = ("--eval-data", data)
    whole = check_runs(run, monkeypatch, "variants.adpo", tiny, data, tmp_path, *more)
    *_, last = log(whole)
    assert last["eval_rewards/margins"] > 0.1 and last["eval_rewards/accuracies"] > 0.6
    check_shard("variants.adpo", tiny, data, tmp_path, whole, *more)
    assert "ADPO" in (whole / "README.md").read_text()


def test_a_run_of_adpo_on_pairs_is_one_of_dpo(tiny, tmp_path, run):
    """With beta_r = 1 / log 9 the target of centred rewards 1 and 0 is (0.9, 0.1)."""
    data, outs = write_lines(tmp_path / "d.jsonl", pairs(9)), (tmp_path / "dpo", tmp_path / "adpo")
    flags = ("--tau", 10, "--centre-only", "--reward-temperature", 1 / math.log(9))
    for name, out, more in zip(("dpo", "adpo"), outs, (("--label-smoothing", 0.1), flags)):
        assert run(f"variants.{name}", *arguments(tiny, data, out, *more))[0] == 0
    for a, b in zip(*map(log, outs)):
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), name
    assert update_error(*map(weights, outs), weights(tiny)) < 0.01


@pytest.mark.parametrize("name", ["dpo", "adpo"])
def test_the_help_names_the_default_out(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit):
        {"dpo": dpo, "adpo": adpo}[name].parse_args()
    assert f"--ckpt with -{name} in its name" in " ".join(capsys.readouterr().out.split())


def test_bad_groups_end_in_one_line(tiny, tmp_path, refused):
    (good,) = groups(1)
    for words, record in (
        ("2 completions and 1 rewards", good | {"rewards": [1]}),
        ("list of numbers", good | {"rewards": [1, "high"]}),
        ("list of numbers", good | {"rewards": [1, float("nan")]}),
        ("list of numbers", good | {"rewards": [1, 10**400]}),
        ("list of numbers", {key: good[key] for key in ("prompt", "completions")}),
        ("at least two", good | {"completions": good["completions"][:1], "rewards": [1]}),
        ("at least two", good | {"completions": "one"}),
        ("d.jsonl:2", good | {"completions": [1, 2]}),
        ("prompt", {key: good[key] for key in ("completions", "rewards")}),
    ):
        data = write_lines(tmp_path / "d.jsonl", [good, record])
        refused(words, "variants.adpo", *arguments(tiny, data, tmp_path / "o"))
    more = ("--label-smoothing", 0.1)
    refused("--label-smoothing", "variants.adpo", *arguments(tiny, data, tmp_path / "o", *more))
    assert not (tmp_path / "o").exists()
