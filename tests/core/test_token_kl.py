"""The KL over the vocabulary: value, gradient, direction, memory, and through forward with sharded weights."""

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import fork

from core import layers
from core.distributed import is_sharded, load_into, shard
from core.files import InputError
from core.head import TokenKL, token_kl
from model import Qwen2


def naive_kl(hidden, weight, ref_hidden, ref_weight, forward):
    logits = [h @ w.to(h.dtype).T for h, w in ((hidden, weight), (ref_hidden, ref_weight))]
    log_p, log_q = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in logits)
    if forward:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("columns", [1, 4, 11, 100])  # of 11 entries: one by one, three tiles, one, one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forward", [False, True])
def test_token_kl_equals_the_naive_formula(columns, dtype, forward):
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(8, 6, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=g, requires_grad=True)  # fp32, as training has it
    ref_hidden, ref_weight = torch.randn(8, 4, generator=g).to(dtype), torch.randn(11, 4, generator=g)
    out_grad = torch.randn(8, generator=g)
    want = naive_kl(hidden, weight, ref_hidden, ref_weight, forward)
    got = TokenKL.apply(hidden, weight, ref_hidden, ref_weight, forward, columns)
    assert got.dtype == torch.float32 and (got > 0).all()
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y, (hidden, weight), out_grad) for y in (got, want))):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() / b.abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.usefixtures("kernels")
def test_token_kl_by_hand():
    """Logits [2, 1, 0] and [0, 0, 1] under a reference with [1, 1, 0] and [0, 1, 1]."""
    z, y, one = torch.tensor([[2.0, 1, 0], [0, 0, 1]]), torch.tensor([[1.0, 1, 0], [0, 1, 1]]), torch.eye(3)
    torch.testing.assert_close(
        token_kl(z, one, y, one, forward=True), torch.tensor([0.123292, 0.111769]), atol=1e-6, rtol=0
    )
    assert token_kl(z, one, y, one).mean().item() == pytest.approx(0.109119, abs=1e-6)
    torch.testing.assert_close(token_kl(z, one, z, one), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("kernels")
def test_token_kl_far_apart():
    """Logits whose exponentials overflow fp32."""
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-900.0], [0.0], [5.0], [900.0], [899.0]])
    for forward in (False, True):
        got = token_kl(hidden, weight, hidden * 0.5, weight, forward)
        want = naive_kl(*(x.double() for x in (hidden, weight, hidden * 0.5, weight)), forward)
        torch.testing.assert_close(
            got, want, rtol=1e-6, atol=1e-4, check_dtype=False
        )  # fp32 holds a logit of 900 to 6e-5


@pytest.mark.usefixtures("kernels")
def test_the_reference_gets_no_gradient_and_no_rows_are_no_error():
    hidden, weight, ref_hidden, ref_weight = (torch.randn(shape, requires_grad=True) for shape in [(5, 4), (9, 4)] * 2)
    token_kl(hidden, weight, ref_hidden, ref_weight).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert ref_hidden.grad is None and ref_weight.grad is None
    assert token_kl(hidden[:0], weight, ref_hidden[:0], ref_weight).shape == (0,)


def test_a_reference_of_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="the reference has 7 vocabulary entries, the model 9"):
        token_kl(torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(2, 4), torch.zeros(7, 4))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if torch.is_tensor(t))])
        return out


@pytest.mark.parametrize("forward", [False, True])
def test_no_tensor_has_all_rows_and_the_whole_vocabulary(forward):
    hidden, weight = torch.randn(30, 2, requires_grad=True), torch.randn(10_000, 2, requires_grad=True)
    with Largest() as largest:
        token_kl(hidden, weight, hidden, weight, forward).sum().backward()
    assert 30 * 2048 <= largest.elements < 30 * 4096


def kl_and_gradients(model, ref, forward_kl):
    ids, at = torch.arange(9)[None], torch.tensor([0, 2, 3, 8])
    logps, kl = model(ids, [4, 5], at, ids[0, at], ref, forward_kl)
    (kl.sum() - 0.5 * logps.sum()).backward()
    return logps.detach(), kl.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("forward_kl", [False, True])
def test_kl_through_forward(forward_kl):
    model, ref = tiny_model(), tiny_model(1, hidden_size=48, num_hidden_layers=1)
    logps, kl, grads = kl_and_gradients(model, ref, forward_kl)
    assert all(p.grad is None for p in ref.parameters())
    model.zero_grad()
    ids, at = torch.arange(9)[None], torch.tensor([0, 2, 3, 8])
    log_p, log_q = model(ids, [4, 5], at).log_softmax(-1), ref(ids, [4, 5], at).detach().log_softmax(-1)
    a, b = (log_q, log_p) if forward_kl else (log_p, log_q)
    want = (a.exp() * (a - b)).sum(-1)
    torch.testing.assert_close(kl, want.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logps, model(ids, [4, 5], at, ids[0, at]).detach())
    (want.sum() - 0.5 * model(ids, [4, 5], at, ids[0, at]).sum()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5)


def sharded(model):
    """The model, spread over the ranks."""
    out = Qwen2(model.raw_config).to("meta")
    shard(out, "cpu", torch.float32)
    out.to_empty(device="cpu")
    for name, p in out.named_parameters():
        load_into(p, dict(model.named_parameters())[name].detach())
    assert is_sharded(out)
    return out


def kl_on_a_rank(rank, store, kernels, forward_kl, path):
    layers.KERNELS = kernels
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    models = [tiny_model(), tiny_model(1, hidden_size=48, num_hidden_layers=1)]
    model, ref = map(sharded, models)
    ids, at = torch.arange(9)[None], torch.tensor([0, 2, 3, 8])
    logits = model(ids, [4, 5], at).detach()
    logps, kl, grads = kl_and_gradients(model, ref.requires_grad_(False), forward_kl)
    grads = {name: g.full_tensor() / 2 for name, g in grads.items()}  # the sum over two ranks of the same work
    if rank == 0:
        torch.save((logits, logps, kl, grads), path)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kernels, forward_kl", [("fused", False), ("fused", True), ("plain", False)])
def test_kl_through_forward_with_sharded_weights(kernels, forward_kl, tmp_path):
    store, path = str(tmp_path / "store"), str(tmp_path / "got.pt")
    ranks = [fork.Process(target=kl_on_a_rank, args=(r, store, kernels, forward_kl, path)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    logits, logps, kl, grads = torch.load(path)
    torch.testing.assert_close(logits, tiny_model()(torch.arange(9)[None], [4, 5], torch.tensor([0, 2, 3, 8])).detach())
    want = kl_and_gradients(tiny_model(), tiny_model(1, hidden_size=48, num_hidden_layers=1), forward_kl)
    for a, b in zip((logps, kl, *grads.values()), (*want[:2], *want[2].values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
