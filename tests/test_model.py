import types

import pytest
import torch
import torch.nn.functional as F
from conftest import relative, tiny_config, tiny_model

from core import layers
from core.attention import KVCache, attend_documents, varlen_attention
from core.head import TokenKL, TokenLogProbs, token_logps
from core.layers import Linear, NormedLinears, SwiGLULinear, rms_norm
from model import Qwen2
from training.logps import example_logps, sequence_logps
from training.setup import recompute


@pytest.mark.usefixtures("kernels")
def test_packed_equals_unpacked_with_gradients():
    model, g = tiny_model(), torch.Generator().manual_seed(3)
    lengths = [1, 17, 5, 30]
    documents = [torch.randint(0, 512, (1, n), generator=g) for n in lengths]
    packed = model(torch.cat(documents, 1), lengths=lengths)
    alone = torch.cat([model(d) for d in documents], 1)
    assert relative(packed, alone) < 1e-6
    weight = torch.randn(packed.shape, generator=g)
    grads = [torch.autograd.grad((x * weight).sum(), list(model.parameters())) for x in (packed, alone)]
    for (name, _), a, b in zip(model.named_parameters(), *grads):
        assert relative(a, b) < 1e-5, name


@pytest.mark.usefixtures("kernels")
def test_a_document_does_not_see_another():
    model = tiny_model()
    ids = torch.randint(0, 512, (1, 20))
    other = ids.clone()
    other[0, :8] = (other[0, :8] + 1) % 512
    assert torch.equal(model(ids, lengths=[8, 12])[:, 8:], model(other, lengths=[8, 12])[:, 8:])


@pytest.mark.parametrize("at", [[3, 4, 7, 19], [19, 0], []])
@pytest.mark.usefixtures("kernels")
def test_states_of_some_positions_are_those_of_all(at):
    model, at = tiny_model(), torch.tensor(at, dtype=torch.long)
    ids = torch.randint(0, 512, (1, 20), generator=torch.Generator().manual_seed(4))
    weighting = torch.linspace(-1, 1, 32)
    some, all_of_them = model.hidden(ids, [8, 12], at=at), model.hidden(ids, [8, 12])[:, at]
    torch.testing.assert_close(some, all_of_them)
    for a, b in zip(
        *(torch.autograd.grad((x * weighting).sum(), list(model.parameters())) for x in (some, all_of_them))
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        cache = model.new_cache(2, 12)
        cache.lengths = [0, 0]
        torch.testing.assert_close(model.hidden(ids, [8, 12], cache, at), some)


@pytest.mark.usefixtures("kernels")
def test_logits_at_positions_of_a_packed_row():
    model, ids = tiny_model(), torch.arange(8)[None]
    at = torch.tensor([1, 2, 7])
    logits = model(ids, lengths=[3, 5], at=at)
    assert logits.shape == (3, 512)
    torch.testing.assert_close(logits, model(ids, lengths=[3, 5])[0, at])
    torch.testing.assert_close(model(ids, [3, 5], at, ids[0, at]), logits.log_softmax(-1)[range(3), ids[0, at]])
    with pytest.raises(ValueError, match="lengths sum to 7"):
        model(ids, lengths=[3, 4], at=at)


@pytest.mark.usefixtures("kernels")
def test_cached_equals_uncached_in_pieces_and_after_removal():
    model, g = tiny_model(), torch.Generator().manual_seed(4)
    documents = [torch.randint(0, 512, (1, 25), generator=g) for _ in range(3)]
    with torch.no_grad():
        full = [model(d)[0] for d in documents]
        cache, seen = KVCache(model.config, 3, 40), [0, 0, 0]
        for lengths in ([5, 9, 2], [1, 1, 1], [0, 4, 3], [1, 1, 1]):
            pieces = [d[:, s : s + n] for d, s, n in zip(documents, seen, lengths)]
            logits = model.head(model.hidden(torch.cat(pieces, 1), lengths, cache))[0].split(lengths)
            for d, (s, n) in enumerate(zip(seen, lengths)):
                torch.testing.assert_close(logits[d], full[d][s : s + n], rtol=1e-4, atol=1e-5)
            seen = [s + n for s, n in zip(seen, lengths)]
        cache.remove(0)  # the last row moves to the front
        assert cache.lengths == [seen[2], seen[1]]
        logits = model.head(
            model.hidden(torch.cat([documents[d][:, seen[d] : seen[d] + 1] for d in (2, 1)], 1), [1, 1], cache)
        )[0]
        torch.testing.assert_close(logits, torch.stack([full[2][seen[2]], full[1][seen[1]]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 4, 11, 100])  # of 11 words: one by one, three tiles, one, one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_equal_log_softmax(columns, dtype):
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(8, 6, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=g, requires_grad=True)  # fp32, as training has it
    targets, out_grad = torch.randint(0, 11, (8,), generator=g), torch.randn(8, generator=g)
    plain = (hidden @ weight.to(dtype).T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours = TokenLogProbs.apply(hidden, weight, targets, columns)
    torch.testing.assert_close(ours, plain)
    grads = [torch.autograd.grad(y, (hidden, weight), out_grad) for y in (ours, plain)]
    for a, b in zip(*grads):
        assert a.dtype == b.dtype
        assert relative(a, b) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert token_logps(hidden[:0], weight, targets[:0]).shape == (0,)


def test_token_logps_far_apart():
    """Logits whose exponentials overflow fp32, rising and falling from tile to tile."""
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-900.0], [0.0], [5.0], [900.0], [899.0]])
    plain = (hidden @ weight.T).log_softmax(-1)
    for word in range(5):
        torch.testing.assert_close(TokenLogProbs.apply(hidden, weight, torch.tensor([word, word]), 2), plain[:, word])


@pytest.mark.usefixtures("kernels")
def test_bf16_compute_over_fp32_weights():
    model = tiny_model()
    ids = torch.randint(0, 512, (1, 12))
    exact = model(ids)
    model.compute_dtype = torch.bfloat16
    rough = model(ids)
    assert rough.dtype == torch.bfloat16 and 0 < relative(rough.float(), exact) < 0.05
    hidden = model.hidden(ids)[0]
    logps = token_logps(hidden, model.head_weight, ids[0])
    assert logps.dtype == torch.float32
    logps.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def plain_varlen(q, k, v, ends_q, ends_k, max_q, max_k, causal, gqa):
    """As the kernel does, the last query of a document is aligned with its last key."""
    for x, ends, longest in ((q, ends_q, max_q), (k, ends_k, max_k), (v, ends_k, max_k)):
        assert ends.dtype == torch.int32 and ends[-1] == len(x) and longest == int(ends.diff().max())
        assert x.is_contiguous()
    assert causal and (gqa or q.shape[1] == k.shape[1])
    out = []
    for i in range(len(ends_q) - 1):
        parts = [x[ends[i] : ends[i + 1]].transpose(0, 1) for x, ends in ((q, ends_q), (k, ends_k), (v, ends_k))]
        Tq, Tk = parts[0].shape[1], parts[1].shape[1]
        mask = torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)
        out.append(F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True))
    return torch.cat(out, dim=1).transpose(0, 1)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0), True)


def varlen_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0), enable_gqa)


@pytest.mark.parametrize("kernel", [varlen_2_11, varlen_2_13])
def test_varlen_attention_under_each_signature(monkeypatch, kernel):
    """The kernel itself runs on GPUs only; what it is called with is checked here."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    lengths, g = [3, 1, 7], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 11, heads, 8, generator=g) for heads in (4, 2, 2))
    got = varlen_attention(q[0], k[0], v[0], lengths)
    torch.testing.assert_close(got[None], attend_documents(q, k, v, lengths))


@pytest.mark.parametrize("kernel", [varlen_2_11, varlen_2_13])
def test_a_packed_step_with_the_varlen_kernel(monkeypatch, kernel):
    """Prompts with and without a cached prefix beside rows that decode: all documents in one call of the kernel."""
    model, lengths = tiny_model(), [1, 1, 5, 3]
    ids = torch.randint(0, 512, (1, 30), generator=torch.Generator().manual_seed(1))

    def step():
        cache = model.new_cache(5, 16)
        model.hidden(ids[:, :20], [7, 6, 3, 4], cache)
        cache.lengths[3] = 0  # a new prompt in a row that was used before
        with torch.no_grad():
            return model.hidden(ids[:, 20:], lengths, cache), cache

    (want, plain), _ = step(), monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr("core.attention.has_varlen_kernel", lambda q: True)
    got, cache = step()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(cache.k, plain.k)


def grads(function, *inputs):
    """The output of function and the gradients of a fixed weighting of it."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    weighting = torch.linspace(-1, 2, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y.float() * weighting).sum(), inputs)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_fused_layers_against_plain_autograd(dtype, tolerance):
    def plain_norm(x, w, *layers):
        h = x.float()
        h = w.to(x.dtype) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        layers = [None if p is None else p.to(x.dtype) for p in layers]
        return torch.cat([F.linear(h, layers[0], layers[1]), F.linear(h, layers[2], bias)], -1)

    def fused_norm(x, w, *layers):
        return torch.cat(NormedLinears.apply(x, w, 1e-6, *layers, bias), -1)

    def plain_swiglu(gate, up, w):
        return F.linear(F.silu(gate) * up, w.to(gate.dtype))

    g = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(2, 5, 32, generator=g).to(dtype) for _ in range(3))
    w, b, u, d = (torch.randn(shape, generator=g) for shape in ((24, 32), (24,), (16, 32), (8, 32)))  # masters in fp32
    norm, bias = 1 + 0.3 * torch.randn(32, generator=g), None
    pairs = [
        (grads(plain_norm, x, norm, w, b, u), grads(fused_norm, x, norm, w, b, u)),
        (grads(plain_swiglu, gate, up, d), grads(SwiGLULinear.apply, gate, up, d)),
    ]
    for want, got in pairs:
        for a, b in zip(want, got, strict=True):
            assert a.dtype == b.dtype and relative(b.float(), a.float()) < tolerance


def test_the_kernels_of_a_gpu_for_rmsnorm_are_the_same_functions():
    """They run on GPUs only; here it is what torch says they compute."""
    table, aten = torch._decomp.decomposition_table, torch.ops.aten
    g = torch.Generator().manual_seed(1)
    x, d_h = (torch.randn(2, 5, 32, generator=g, requires_grad=True) for _ in range(2))
    w = torch.rand(32, generator=g, requires_grad=True)
    h, r = rms_norm(x, w, 1e-2)
    want = h, r, *torch.autograd.grad(h, (x, w), d_h)
    got = (
        *table[aten._fused_rms_norm.default](x, w.shape, w, 1e-2),
        *table[aten._fused_rms_norm_backward.default](d_h, x, w.shape, r, w, [True, True]),
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


class LoRA(Linear):
    """A Linear with an update of rank 1, which a user would write."""

    def __init__(self, of):
        super().__init__(of.in_features, of.out_features, of.bias is not None)
        self.load_state_dict(of.state_dict())
        self.A, self.B = (
            torch.nn.Parameter(torch.full(shape, 0.1)) for shape in ((of.in_features, 1), (1, of.out_features))
        )

    def forward(self, x):
        return super().forward(x) + x @ self.A @ self.B


@pytest.mark.usefixtures("kernels")
def test_what_stands_in_place_of_a_layer_is_called():
    """Each projection in turn as its LoRA, which equals the model with the product added to its matrix; and hooks."""
    ids = torch.arange(9)[None]
    for part, names in ("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")):
        for name in (f"{n}_proj" for n in names):
            model, merged = tiny_model(), tiny_model()
            block, twin = (getattr(x.model["layers"][0], part) for x in (model, merged))
            setattr(block, name, lora := LoRA(getattr(block, name)))
            with torch.no_grad():
                getattr(twin, name).weight += (lora.A @ lora.B).T
            torch.testing.assert_close(got := model(ids), merged(ids))
            got.square().sum().backward()
            assert lora.A.grad.abs().sum() > 0, name
    model, seen = tiny_model(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: seen.append(module))
    model(ids)
    assert {*model.modules()} - {*seen} == {model.model, model.model["layers"]}, "all but the two containers"


@pytest.mark.usefixtures("kernels")
def test_a_frozen_matrix_gets_no_gradient():
    model, ids = tiny_model(), torch.arange(9)[None]
    attention = model.model["layers"][0].self_attn
    attention.q_proj.weight.requires_grad_(False)
    model(ids).sum().backward()
    assert attention.q_proj.weight.grad is None and attention.k_proj.weight.grad is not None


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("kernels")
def test_packed_gradients_whatever_the_number_of_threads(threads):
    """With three threads the key-value heads of a long document are repeated, with one they are not."""
    model, lengths, before = tiny_model(), [4, 300, 1], torch.get_num_threads()
    ids = torch.randint(0, 512, (1, 305), generator=torch.Generator().manual_seed(0))
    weighting = torch.linspace(-1, 1, 305)[None, :, None]
    parts = [(model.hidden(part) * w).sum() for part, w in zip(ids.split(lengths, 1), weighting.split(lengths, 1))]
    want = torch.autograd.grad(sum(parts), list(model.parameters()))
    try:
        torch.set_num_threads(threads)
        got = torch.autograd.grad((model.hidden(ids, lengths) * weighting).sum(), list(model.parameters()))
    finally:
        torch.set_num_threads(before)
    assert all(relative(b, a) < 1e-4 for a, b in zip(want, got))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_fused_equals_plain(dtype, tolerance, monkeypatch):
    """The whole of a training forward and backward under KERNELS=fused and KERNELS=plain."""
    model, lengths = tiny_model(), [4, 300, 1]
    model.compute_dtype = dtype
    ids = torch.randint(0, 512, (1, 305), generator=torch.Generator().manual_seed(0))
    at = torch.arange(0, 305, 2)
    out = []
    for kernels in ("plain", "fused"):
        monkeypatch.setattr(layers, "KERNELS", kernels)
        logps = model(ids, lengths, at, ids[0, at])
        names = {node[0].name() for node in walk(logps.grad_fn)}
        custom = {"NormedLinearsBackward", "SwiGLULinearBackward", "TokenLogProbsBackward"}
        assert custom & names == (custom if kernels == "fused" else set())
        out.append([logps, *torch.autograd.grad(logps.square().sum(), list(model.parameters()))])
    assert all(relative(b, a) < tolerance for a, b in zip(*out, strict=True))


def walk(node):
    """The nodes of an autograd graph, as pairs (node, index)."""
    seen, todo = set(), [(node, 0)]
    while todo:
        pair = todo.pop()
        if pair[0] is not None and pair not in seen:
            seen.add(pair)
            todo += pair[0].next_functions
    return seen


def test_an_unknown_value_of_kernels_is_refused(tiny, refused, monkeypatch):
    monkeypatch.setattr(layers, "KERNELS", "fast")
    words = "KERNELS=fast in the environment: set it to fused or plain, or unset it"
    refused(words, "generate", "--ckpt", tiny, "--prompt", "Hello")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_blocks_of_one_graph_for_all_lengths(dtype, tolerance, monkeypatch):
    """What is captured gives the plain model's numbers, and other lengths bring no other graph."""
    from torch._dynamo.utils import counters

    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **more: real(f, backend="aot_eager", **more)
    )  # no C++ compiler needed
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = tiny_model(), tiny_model()
    plain.compute_dtype = compiled.compute_dtype = dtype
    compiled.compile()
    for lengths in ([4, 9, 1], [7], [20, 5]):
        ids = torch.randint(0, 512, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
        got, want = ([model.hidden(ids, lengths).float()] for model in (compiled, plain))
        for model, out in ((compiled, got), (plain, want)):
            out += torch.autograd.grad(out[0].square().sum(), list(model.parameters()))
        assert all(relative(a, b) < tolerance for a, b in zip(got, want))
        assert counters["stats"]["unique_graphs"] == 2, "one before attention, one after, for all blocks"


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ways_of_a_gpu_fit_together(dtype, monkeypatch):
    """What only CUDA tensors run through, on such that have a shape and no values, so no GPU is needed: the forward of training,
    prefill, continuation, decoding, and the hand-written backwards. The engine that runs these asks for a device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    torch._C._ensureCUDADeviceGuardSet()

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    def ids(n):
        return torch.zeros(1, n, dtype=torch.long, device="cuda")

    def check(got, like):
        assert all(
            (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "cuda") for a, b in zip(got, like, strict=True)
        )

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = Qwen2(tiny_config())
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(empty(*p.shape, dtype=torch.float32)))
        model.compute_dtype = dtype
        check([model(ids(27), [20, 7], ids(11)[0], ids(11)[0])], [empty(11, dtype=torch.float32)])

        cache = model.new_cache(4, 64)
        cache.lengths = [0] * 3
        for more, lengths in (
            (0, [10, 10, 7]),
            (1, [1, 1, 1, 5]),
            (0, [1, 2, 2, 1]),
        ):  # prefill, beside a step, continuation
            cache.lengths += [0] * more
            check([model.hidden(ids(sum(lengths)), lengths, cache, ids(3)[0])], [empty(1, 3, 32)])
        cache.positions, cache.width = ids(4)[0], 32
        check([model.hidden(ids(4).T, cache=cache)], [empty(4, 1, 32)])

        x, w, wide = empty(1, 27, 32), empty(64, 32, dtype=torch.float32), empty(1, 27, 64)
        for function, inputs, out in (
            (NormedLinears, (x, w[0], 1e-6, w, w[:, 0], w, None), (wide, wide)),
            (SwiGLULinear, (wide, wide, w.T), (x,)),
            (TokenLogProbs, (x[0], w, ids(27)[0], 24, False), (empty(27, dtype=torch.float32),)),
            (TokenLogProbs, (x[0], w, ids(27)[0], 24, True), (empty(27, dtype=torch.float32),)),
            (TokenKL, (x[0], w, x[0], w, False, 24), (empty(27, dtype=torch.float32),)),
            (TokenKL, (x[0], w, x[0], w, True, 24), (empty(27, dtype=torch.float32),)),
        ):
            needed = [torch.is_tensor(i) and i.is_floating_point() for i in inputs]
            if function is TokenKL:
                needed[2:4] = False, False  # the reference
            ctx = types.SimpleNamespace(needs_input_grad=needed)
            ctx.save_for_backward = lambda *saved: setattr(ctx, "saved_tensors", saved)
            got = function.forward(ctx, *inputs)
            check(got if isinstance(got, tuple) else (got,), out)
            gradients = function.backward(ctx, *out)
            wanted = [(a, b) for a, b, needed in zip(gradients, inputs, ctx.needs_input_grad, strict=True) if needed]
            check(*zip(*wanted))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: TEST_GPU=1")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_gpu_gives_the_log_probabilities_and_gradients_of_a_cpu(dtype, tolerance):
    """Packed documents, with activation checkpointing and without; bf16 against the CPU's fp32."""
    g, examples = torch.Generator().manual_seed(5), []
    for n in (40, 3, 300, 1100):
        examples.append((torch.randint(0, 512, (n,), generator=g).tolist(), [t > n // 3 for t in range(n)]))
    want = example_logps(model := tiny_model(max_position_embeddings=2048), examples)
    gradients = torch.autograd.grad(want.sum() / 100, list(model.parameters()))
    for again in (False, True):
        model = tiny_model(max_position_embeddings=2048).to("cuda")
        model.compute_dtype = dtype
        for block in model.model["layers"] if again else []:
            recompute(block)
        got = example_logps(model, examples)
        assert relative(got.cpu(), want) < tolerance / 10
        assert relative(sequence_logps(model, examples, 400).cpu(), want) < tolerance / 10
        for a, b in zip(torch.autograd.grad(got.sum() / 100, list(model.parameters())), gradients):
            assert a.dtype == torch.float32
            assert relative(a.cpu(), b) < tolerance
