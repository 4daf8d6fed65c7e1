"""UDS: scores and choice by hand, scores without logits, ranks, resuming in the middle of the memory, runs."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import write_lines
from training_runs import chats, launch, log, update_error, weights
from variant_runs import arguments, check_runs

from core.distributed import ONE_RANK
from model import Qwen2
from variants.uds import Sampler, choose_best, diversity, utility

LOGITS = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
Z = torch.tensor([[3.0, 4.0], [0.0, 0.0], [12.0, 16.0]])
MEMORY = torch.tensor([[0.0, 0.0], [6.0, 8.0]])


def test_scores_and_choice_by_hand():
    u, d = torch.stack([utility(logits) for logits in LOGITS]), diversity(Z, MEMORY)
    assert u.tolist() == pytest.approx([7, 5, 2], abs=1e-5) and d.tolist() == pytest.approx([5, 5, 15])
    assert (u + 0.1 * d).tolist() == pytest.approx([7.5, 5.5, 3.5], abs=1e-5)
    assert choose_best(u, d, 0.1, 1) == [0] and choose_best(u, d, 1, 1) == [2]
    assert choose_best(u, d, 1, 2) == [0, 2]
    assert diversity(Z, MEMORY[:0]).tolist() == [0, 0, 0]


def sampler(tiny, steps, **changes):
    flags = {"max_len": 16, "seed": 0, "alpha": 2.5e-3, "share": 0.5, "memory": 3, "micro_tokens": 40} | changes
    model = Qwen2.from_pretrained(tiny)
    setup = SimpleNamespace(args=SimpleNamespace(**flags), ranks=ONE_RANK, model=model, steps=steps)
    return Sampler(setup), model


def test_scores_without_logits_are_those_of_the_logits(tiny):
    own, model = sampler(tiny, [[0]])
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(512, (n,), generator=g).tolist() for n in (5, 16, 9)]
    u, z = own.score(model, [(ids, [False] * (len(ids) - 1) + [True]) for ids in rows])
    for ids, u_i, z_i in zip(rows, u, z):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0]  # (T, V), the prompt's positions too
        torch.testing.assert_close(u_i, utility(logits), rtol=1e-3, atol=1e-3)
        projected = own.left[:, : len(ids)] @ logits @ own.right
        torch.testing.assert_close(z_i, projected.flatten(), rtol=1e-3, atol=1e-3)
    assert own.alpha == pytest.approx(2.5e-3 * math.sqrt(16 * 512) / 2)


def test_the_projection_keeps_distances(tiny):
    """Squared distances, averaged over 40 projections; the tolerance is three standard errors."""
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    drawn = [sampler(tiny, [[0]], seed=seed)[0] for seed in range(40)]
    ratios = [((own.left @ x @ own.right).norm() / x.norm()).square().item() for own in drawn]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)


def test_the_memory_is_of_the_last_chosen_and_a_step_can_be_repeated(tiny):
    steps = [[0, 1, 2, 3]] * 6 + [[0, 1]]  # 2 chosen in each, 1 in the last
    own, model = sampler(tiny, steps)
    assert own.sizes == [2] * 6 + [1] and len(model.uds_memory) == 5
    chosen, seen = [], []
    for step in range(7):
        g = torch.Generator().manual_seed(step)
        rows = [torch.randint(512, (n,), generator=g).tolist() for n in (9, 12, 7, 10)[: len(steps[step])]]
        examples = [(ids, [False, *[True] * (len(ids) - 1)]) for ids in rows]
        u, z = own.score(model, examples)
        memory = torch.stack(seen[-3:]) if seen else z[:0]
        want = choose_best(u, diversity(z, memory), own.alpha, own.sizes[step])
        batch = SimpleNamespace(step=step, examples=examples)
        assert own.choose(model, batch) == want == own.choose(model, batch)
        chosen.append(want)
        seen += z[want]
    assert len({tuple(c) for c in chosen[:6]}) > 1


def test_runs(tiny, tmp_path, run, monkeypatch, refused):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    more = ("--share", 0.5, "--memory", 3, "--alpha", 0.1)
    whole = check_runs(run, monkeypatch, "variants.uds", tiny, data, tmp_path, *more)
    out = tmp_path / "ranks"
    codes, texts = launch("variants.uds", arguments(tiny, data, out, *more), tmp_path / "text", 2)
    assert codes == [0, 0], texts
    assert [s["tokens"] for s in log(out)] == [s["tokens"] for s in log(whole)]
    assert update_error(weights(out), weights(whole), weights(tiny)) < 0.01
    assert weights(out).keys() == weights(tiny).keys()
    refused("--shard", "variants.uds", *arguments(tiny, data, tmp_path / "o", "--shard"))
    refused("--share", "variants.uds", *arguments(tiny, data, tmp_path / "o", "--share", 1.5))
    refused("--share", "variants.uds", *arguments(tiny, data, tmp_path / "o", "--share", 0))


def test_all_candidates_are_plain_sft(tiny, tmp_path, run):
    data, plain, every = write_lines(tmp_path / "d.jsonl", chats(13)), tmp_path / "plain", tmp_path / "every"
    assert run("train_sft", *arguments(tiny, data, plain))[0] == 0
    assert run("variants.uds", *arguments(tiny, data, every, "--share", 1))[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(every).values()))
