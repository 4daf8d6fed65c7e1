"""Casting each weight once per step changes no bit, and the copies are used only inside their context."""

import pytest
import torch
from conftest import tiny_model

from core.casts import cast_copies, cast_once
from core.head import TokenLogProbs
from training.logps import sequence_logps, supervised_logps
from training.setup import spend_spare_memory

EXAMPLES = [([3, 7, 1, 9, 9, 4], [False, True, True, False, True, True]), ([5, 2, 8], [False, False, True])]


def bf16_model(**changes):
    model = tiny_model(**changes)
    model.compute_dtype = torch.bfloat16
    return model


def gradients(model):
    supervised_logps(model, EXAMPLES)[0].sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_copies_change_no_bit(tied):
    model = bf16_model(tie_word_embeddings=tied)
    wanted, logps = gradients(model), sequence_logps(model, EXAMPLES, 64)
    copies = cast_copies(model, 2**30)
    assert {id(w) for w, _ in copies} == {id(p) for p in model.parameters() if p.ndim > 1}
    with cast_once(copies):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted))
        assert torch.equal(sequence_logps(model, EXAMPLES, 64), logps)


def test_copies_are_read_inside_the_context_and_refreshed():
    model = bf16_model()
    copies = cast_copies(model, 2**30)
    with cast_once(copies), torch.no_grad():
        before = sequence_logps(model, EXAMPLES, 64)
        for _, copy in copies:
            copy.zero_()
        assert not torch.equal(sequence_logps(model, EXAMPLES, 64), before)
    assert torch.equal(sequence_logps(model, EXAMPLES, 64), before)
    with torch.no_grad():
        model.head_weight.mul_(2)
    wanted = sequence_logps(model, EXAMPLES, 64)
    with cast_once(copies):
        assert torch.equal(sequence_logps(model, EXAMPLES, 64), wanted)


def test_no_copies_where_they_do_not_fit_or_nothing_is_cast():
    model = bf16_model()
    size = 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert cast_copies(model, size) and not cast_copies(model, size - 1)
    assert not cast_copies(tiny_model(), 2**30)


def test_spare_memory_goes_to_the_copies_first():
    model = bf16_model()
    size = 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1)
    spend_spare_memory(model, size + 100)
    assert len(model.casts) == len(cast_copies(model, size)) and model.spare_bytes == 100
    spend_spare_memory(model, size - 1)
    assert not model.casts and model.spare_bytes == size - 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_kept_logits_change_no_bit(dtype, monkeypatch):
    """spare_bytes decides to the byte, and the gradients are those of recomputed logits."""
    model, asked, real = tiny_model(), [], TokenLogProbs.apply
    model.compute_dtype = dtype
    monkeypatch.setattr(TokenLogProbs, "apply", lambda *args: asked.append(args[-1]) or real(*args))
    wanted = gradients(model)
    size = 5 * 512 * (dtype or torch.float32).itemsize  # 5 supervised tokens
    for spare, kept in ((size - 1, False), (size, True)):
        model.spare_bytes = spare
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted))
        assert asked[-1] is kept
    with torch.no_grad():
        supervised_logps(model, EXAMPLES)
    assert asked[-1] is False


def test_the_sparse_gradient_of_a_tied_embedding_is_the_dense_one(monkeypatch):
    """Its rows are added to the head's gradient, so that no parameter's gradient is sparse, whatever the order."""
    model = tiny_model()
    once, twice = (gradients(model) for _ in range(2))
    assert all(g.layout is torch.strided for g in once)
    monkeypatch.setattr("model.fused", lambda: False)  # a dense gradient of the embedding
    for got, want in zip(once, gradients(model)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
