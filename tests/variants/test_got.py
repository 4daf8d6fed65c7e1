"""GOT-D: potentials by hand and against brute force, the sign of the selection, a run on the demo."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_files, tiny_model, write_lines

from core.devices import to_device
from core.distributed import single_process
from core.files import InputError
from model import Qwen2
from variants import got
from variants.got import embed_texts, sinkhorn, squared_distances

DEMO = str(ROOT / "demo/base")


def line(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_potentials_by_hand():
    g = sinkhorn(squared_distances(line(0, 1), line(0.1, 0.9, 3, 0.2)), 0.1)[1]
    assert (g - g.mean()).tolist() == pytest.approx([-1.058, -0.952, 3.038, -1.028], abs=1e-3)
    assert g.argsort().tolist() == [0, 3, 1, 2]


def random_cost(m, n, seed):
    draw = torch.Generator().manual_seed(seed)
    return squared_distances(torch.randn(m, 3, generator=draw), torch.randn(n, 3, generator=draw))


@pytest.mark.parametrize("seed", range(3))
def test_small_eps_gives_the_exact_distance(seed):
    cost = random_cost(5, 5, seed)
    exact = min(sum(cost[i, j] for i, j in enumerate(order)) / 5 for order in itertools.permutations(range(5)))
    f, g, error = sinkhorn(cost, 0.005, 4000)
    assert error < 1e-3 and (f.mean() + g.mean()).item() == pytest.approx(exact.item(), abs=0.02)
    assert (f[:, None] + g - cost).max() < 0.02, "the potentials of the linear programme"


def test_both_masses_are_uniform(monkeypatch):
    cost = random_cost(6, 10, 0)
    f, g, _ = sinkhorn(cost, 0.3, tol=1e-12)
    plan = ((f[:, None] + g - cost) / 0.3).exp() / cost.numel()
    assert plan.sum(0).tolist() == pytest.approx([1 / 10] * 10) and plan.sum(1).tolist() == pytest.approx([1 / 6] * 6)
    monkeypatch.setattr(got, "TILE", 3)
    assert torch.allclose(sinkhorn(cost, 0.3, tol=1e-12)[1], g)


def test_smallest_potentials_bring_the_candidates_nearest():
    """One more copy of candidate j changes the distance in the order of g: a sign or an index mistaken shows here."""
    cost, eps = random_cost(6, 30, 1), 0.3
    g = sinkhorn(cost, eps)[1]
    value = lambda c: sum(part.mean().item() for part in sinkhorn(c, eps)[:2])
    after = torch.tensor([value(torch.cat((cost, cost[:, [j]]), dim=1)) for j in range(30)])
    assert after.argmin() == g.argmin() and after.argmax() == g.argmax()
    first_order = (after - value(cost)) * 31  # the masses of the others shrink: g_j - mean g
    assert torch.corrcoef(torch.stack((first_order, g - g.mean())))[0, 1] > 0.99
    assert after.min() < value(cost) < after.max()


def test_embeddings_are_means_over_a_texts_own_positions(tiny):
    model = Qwen2.from_pretrained(tiny)
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    with torch.no_grad():
        want = torch.stack([model.hidden(to_device([ids], "cpu"))[0].mean(0) for ids in texts])
    for micro_tokens in 1, 1000:
        assert torch.allclose(embed_texts(model, texts, micro_tokens), want, atol=1e-5)


def test_run_on_the_demo(tmp_path, run):
    rows = [json.loads(text) for text in (ROOT / "demo/heldout.jsonl").read_text().splitlines()]
    of = lambda *tasks: [
        {"prompt": r["prompt"], "completion": "x", "task": r["task"]} for r in rows if r["task"] in tasks
    ]
    kinds = sorted({r["task"] for r in rows})
    pool = of(*kinds[:8])
    targets, pool = pool[:3], pool[3:]
    mine = sum(r["task"] == targets[0]["task"] for r in pool)
    data, aim = write_lines(tmp_path / "pool.jsonl", pool), write_lines(tmp_path / "aim.jsonl", targets)
    out = tmp_path / "o"
    call = ("--ckpt", DEMO, "--candidates", data, "--targets", aim, "--out", out, "--keep", mine)
    code, printed, err = run("variants.got", *call)
    assert code == 0, err
    kept = [json.loads(text) for text in (out / "sft.jsonl").read_text().splitlines()]
    assert len(kept) == mine and all(record in pool for record in kept)
    assert sum(r["task"] == targets[0]["task"] for r in kept) > 0.6 * mine, "chance would be an eighth"
    scores = [json.loads(text) for text in (out / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == len(pool) and sum(s["kept"] for s in scores) == mine
    assert max(s["score"] for s in scores if s["kept"]) <= min(s["score"] for s in scores if not s["kept"])
    assert "python train_sft.py --ckpt" in printed and str(out / "sft.jsonl") in printed


def test_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        single_process(got.main)()


def test_refusals(tiny, tmp_path, refused):
    pool = write_lines(tmp_path / "pool.jsonl", [{"prompt": "a", "completion": x} for x in "bc"])
    same = write_lines(tmp_path / "same.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    aim, none = write_lines(tmp_path / "aim.jsonl", [{"prompt": "a"}]), write_lines(tmp_path / "none.jsonl", [])
    odd = write_lines(tmp_path / "odd.jsonl", [{"prompt": "a"}, {"words": 1}])

    def call(candidates, targets, keep=1, ckpt=tiny):
        where = ("--candidates", candidates, "--targets", targets, "--out", tmp_path / "o")
        return "variants.got", "--ckpt", ckpt, *where, "--keep", keep

    refused("--keep 2", *call(pool, aim, 2))
    refused("--keep", *call(pool, aim, 0))
    refused("none.jsonl", *call(none, aim))
    refused("none.jsonl", *call(pool, none))
    refused("odd.jsonl:2", *call(pool, odd))
    refused(["tiny", "one point"], *call(same, same))
    refused("nowhere", *call(pool, aim, ckpt=tmp_path / "nowhere"))
    model, diverged = tiny_model(), str(tmp_path / "diverged")
    model.model["norm"].weight.data.fill_(3e38)
    model.save(diverged, tiny_files())
    refused(["diverged", "finite numbers"], *call(pool, aim, ckpt=diverged))
    assert not Path(tmp_path / "o").exists()
