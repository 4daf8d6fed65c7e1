"""OTR: hand-computed numbers, its expectation, DFT as its special case, runs."""

from types import SimpleNamespace

import pytest
import torch
import torch.utils._pytree as pytree
from conftest import write_lines
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import chats, log
from variant_runs import arguments, check_divergence, check_runs

import train_sft
from model import Qwen2
from variants import otr
from variants.dft import dft_loss
from variants.otr import expected_otr_loss, otr_loss, sample_tokens

LOGITS, GOLD, SAMPLES = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]), torch.tensor([[0, 1, 0, 2]])


def gradient(loss_of):
    z = LOGITS.clone().requires_grad_()
    loss_of(z).backward()
    return z.grad.flatten()


def test_loss_by_hand():
    assert otr_loss(LOGITS, SAMPLES, GOLD, 1, -0.1).item() == pytest.approx(0.108423, abs=1e-6)
    assert otr_loss(LOGITS, SAMPLES, GOLD, 1, 0.0).item() == pytest.approx(0.203803, abs=1e-6)
    assert expected_otr_loss(LOGITS, GOLD, 1, -0.1, 1.3).item() == pytest.approx(0.173226, abs=1e-6)
    got = gradient(lambda z: expected_otr_loss(z, GOLD, 1, -0.1, 1.3))
    assert got.tolist() == pytest.approx([-0.226370, 0.163562, 0.062808], abs=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 0.0, 0.4])
def test_the_expected_gradient_at_kappa_1_is_that_of_dft(beta):
    got = gradient(lambda z: expected_otr_loss(z, GOLD, 1, beta, 1.0))
    dft = gradient(lambda z: dft_loss(z.log_softmax(-1)[:, 0], 1))
    assert got.tolist() == pytest.approx(((1 - beta) * dft).tolist(), abs=1e-7)


def test_samples_come_from_the_tempered_softmax():
    samples = sample_tokens(LOGITS, 20000, 1.3, "seed")
    shares = samples.flatten().bincount(minlength=3) / 20000
    assert shares.tolist() == pytest.approx([0.595919, 0.276131, 0.127950], abs=0.015)
    want = expected_otr_loss(LOGITS, GOLD, 1, -0.1, 1.3).item()
    assert otr_loss(LOGITS, samples, GOLD, 1, -0.1).item() == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("samples", [0, 8])
def test_never_holds_more_logits_than_a_tile(tiny, monkeypatch, samples):
    """In tiles of 3 positions: the loss and gradient of all logits at once, and no tensor of more than 3 rows of V."""
    model, g = Qwen2.from_pretrained(tiny), torch.Generator().manual_seed(0)
    V = model.config.vocab_size
    ids = torch.randint(V, (2, 11), generator=g).tolist()
    examples = [(ids[0], [False] * 4 + [True] * 7), (ids[1], [False] * 9 + [True] * 2)]
    batch = train_sft.StepBatch(0, 1, [0, 1], examples, 9)
    args = SimpleNamespace(beta=-0.1, kappa=1.3, samples=samples, seed=0)
    rows, found = set(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            tensors = [t for t in pytree.tree_leaves(out) if torch.is_tensor(t) and t.shape[-1:] == (V,)]
            rows.update(t.numel() // V for t in tensors if len(t) != model.config.hidden_size)  # not the head
            return out

    draw = lambda logits, k, kappa, seed: torch.arange(k).expand(len(logits), k) * 7  # whatever the tile
    monkeypatch.setattr(otr, "sample_tokens", draw)
    for tile in (3 * V, 99 * V):
        monkeypatch.setattr(otr, "TILE", tile)
        rows.clear()
        with Watch():
            loss = otr.micro_loss(model, batch, [1, 0], args)
            loss.backward()
        found.append((loss.item(), *(p.grad.clone() for p in model.parameters())))
        assert max(rows) == (3 if tile == 3 * V else 7)
        model.zero_grad()
    for in_tiles, whole in zip(*found):
        torch.testing.assert_close(in_tiles, whole)


def test_runs(tiny, tmp_path, run, monkeypatch, refused):
    data = write_lines(tmp_path / "d.jsonl", chats(13))
    check_runs(run, monkeypatch, "variants.otr", tiny, data, tmp_path, "--beta", -0.1, "--samples", 0)
    first = {}
    for cut in (1, 2000):  # one step: later on a rounding error may change a sample
        more = ("--beta", -0.1, "--max-steps", 1, "--micro-tokens", cut)
        assert run("variants.otr", *arguments(tiny, data, tmp_path / f"{cut}", *more))[0] == 0
        first[cut] = log(tmp_path / f"{cut}")[0]
    assert first[1]["loss"] == pytest.approx(first[2000]["loss"], rel=1e-5)
    assert first[1]["grad_norm"] == pytest.approx(first[2000]["grad_norm"], rel=1e-3)
    check_divergence(run, "variants.otr", *arguments(tiny, data, tmp_path / "diverged", "--beta", -0.1))
    refused("--beta", "variants.otr", *arguments(tiny, data, tmp_path / "o"))
    refused("--beta", "variants.otr", *arguments(tiny, data, tmp_path / "o", "--beta", 1))
    refused("--shard", "variants.otr", *arguments(tiny, data, tmp_path / "o", "--beta", 0, "--shard"))
