"""Qwen2 in plain PyTorch: the forward pass, the KV cache, and the log-probabilities that training needs.

    m = Qwen2.from_pretrained("Qwen/Qwen2-0.5B-Instruct")     # a hub id, a Hugging Face directory or a .pt file
    logits = m(input_ids)                                     # (B, T) -> (B, T, V)

Several documents may lie in one row without padding: m.hidden(ids, lengths=[3, 5]) with ids (1, 8). Positions restart
with each document and none sees another. Tensor names are Hugging Face's, so a state dict is a checkpoint.
"""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import KVCache, attention, to_device
from checkpoint import Checkpoint, InputError, parse_config, release, write_checkpoint
from memory import available_memory, head_columns

# ---------------------------------------------------------------------------------------------------------------------
# The forward pass


def project(x, weight, bias=None):
    """x (..., C) times weight^T (O, C), plus bias, in the dtype of x: fp32 master weights compute in bf16 without autocast."""
    packed = getattr(weight, "packed", None)
    if packed is not None and x.dtype == weight.dtype and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@contextlib.contextmanager
def packed_weights(m):
    """While it is open, m's matrices also stand in the layout that oneDNN's kernels read on a CPU.

    A step of decoding has few rows, and F.linear reorders the whole weight for each of its calls: with 8 to 64 rows the
    reordered copy is 1.3 to 2 times as fast. It takes as much memory as the weights, so it is made only where half of
    what the machine has left is enough, and only on a CPU whose oneDNN has kernels for the weights' dtype.
    """
    weights = [p for p in m.parameters() if p.ndim == 2 and p is not m.model["embed_tokens"].weight or p is m.head_weight]
    size = sum(p.numel() * p.element_size() for p in weights)
    dtype, there = m.head_weight.dtype, m.device.type == "cpu" and torch.backends.mkldnn.is_available()
    known = there and (dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if known and 2 * size < available_memory():
        for p in weights:
            p.packed = torch.ops.mkldnn._reorder_linear_weight(p.detach(), 64)
    try:
        yield
    finally:
        for p in weights:
            p.packed = None


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # where normal_ would load half of torch's compiler, a second, to fill nothing
            super().reset_parameters()


class Linear(nn.Linear):
    def forward(self, x):
        return project(x, self.weight, self.bias)


def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) of each row, in fp32: (..., C) -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()


def scaled(x, r, weight):
    """RMSNorm (arXiv 1910.07467) of x, given r = inverse_rms(x): x r weight, in the dtype of x."""
    return (x * r).to(x.dtype) * weight.to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return scaled(x, inverse_rms(x, self.eps), self.weight)


class NormedLinears(torch.autograd.Function):
    """h = RMSNorm(x), then h W^T + b of each (W, b) in layers = W, b, W, b, ...; a b may be None. x: (..., C).

    Keeps x and one number a row: the backward makes h again, and sums the layers' gradients of h inside the matmuls.
    With n = x r, r = inverse_rms(x), g the gradient of h and w the norm's weight (C,):
    dx = r (g w - n mean(g w n)), dw = sum over rows of g n."""

    @staticmethod
    def forward(ctx, x, w, eps, *layers):
        r = inverse_rms(x, eps)
        ctx.save_for_backward(x, r, w, *layers[::2])
        h = scaled(x, r, w)
        return tuple(project(h, weight, bias) for weight, bias in zip(layers[::2], layers[1::2]))

    @staticmethod
    def backward(ctx, *grads):
        x, r, w, *weights = ctx.saved_tensors
        h = scaled(x, r, w).flatten(0, -2)  # (T, C)
        g, d_layers = torch.empty_like(h), []
        for i, (d_y, weight) in enumerate(zip(grads, weights)):
            d_y = d_y.flatten(0, -2)  # (T, O)
            torch.addmm(g, d_y, weight.to(d_y.dtype), beta=min(i, 1), out=g)
            for wanted, of in zip(ctx.needs_input_grad[3 + 2 * i :], (lambda: d_y.T @ h, lambda: d_y.sum(0))):
                d_layers.append(of().to(weight.dtype) if wanted else None)
        n, g = (x * r).flatten(0, -2), g.float()  # the rest in fp32
        gn = g * n
        mean = (gn @ w.float()).div_(x.shape[-1])  # (T,)
        d_x = n.mul_(-mean[:, None]).addcmul_(g, w.float()).view(x.shape).mul_(r)
        return d_x.to(x.dtype), gn.sum(0).to(w.dtype), None, *d_layers


def normed_linears(x, norm, *linears):
    """linear(norm(x)) of each of the linear layers."""
    if torch.compiler.is_compiling():  # a compiler finds for itself what to fuse and what to make again
        h = norm(x)
        return [linear(h) for linear in linears]
    return NormedLinears.apply(x, norm.weight, norm.eps, *(p for linear in linears for p in (linear.weight, linear.bias)))


class SwiGLULinear(torch.autograd.Function):
    """(silu(gate) * up) W^T (arXiv 2002.05202); keeps gate and up, and makes their product again in the backward."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return project(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx, g):
        gate, up, weight = ctx.saved_tensors
        d_product = g @ weight.to(g.dtype)
        silu = F.silu(gate)
        d_weight = g.flatten(0, -2).T @ (silu * up).flatten(0, -2)
        return torch.ops.aten.silu_backward(d_product * up, gate), silu.mul_(d_product), d_weight.to(weight.dtype)


def swiglu_linear(gate, up, linear):
    """linear(silu(gate) * up)."""
    if torch.compiler.is_compiling():
        return linear(F.silu(gate) * up)
    return SwiGLULinear.apply(gate, up, linear.weight)


def rope_table(positions, config, dtype):
    """cos and sin of the rotary angles (arXiv 2104.09864), half-split: dimension i turns with i + D/2.

    positions: (T,) or (B, T) integers -> two tensors (..., T, D), the first half of the sines negated: what apply_rope
    multiplies with the other half of x. The angles are fp32 whatever the dtype.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[..., None].float() / config.rope_theta**exponent  # (..., T, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (..., T, D)


def apply_rope(x, cos, sin):
    """x: (B, T, H, D), rotated by the angles of rope_table."""
    return (x * cos[..., None, :]).addcmul_(x.roll(x.shape[-1] // 2, -1), sin[..., None, :])


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=True)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=True)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=True)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def before_attention(self, x, rope):
        """(B, T, C) -> q (B, T, Hq, D), k and v (B, T, Hkv, D)."""
        attn = self.self_attn
        q, k, v = normed_linears(x, self.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (y.unflatten(-1, (-1, attn.head_dim)) for y in (q, k, v))
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def after_attention(self, x, y):
        """x (B, T, C), y (B, T, Hq, D) -> (B, T, C)."""
        x = x + self.self_attn.o_proj(y.flatten(-2))
        gate, up = normed_linears(x, self.post_attention_layernorm, self.mlp.gate_proj, self.mlp.up_proj)
        return x + swiglu_linear(gate, up, self.mlp.down_proj)

    def forward(self, x, rope, lengths, cache, layer, at=None):
        q, k, v = self.before_attention(x, rope)
        y = attention(q, k, v, lengths, cache, layer)
        if at is not None:
            x, y = x.index_select(1, at), y.index_select(1, at)
        return self.after_attention(x, y)


class Qwen2(nn.Module):
    """config: a config.json as a dict. Weights are as torch initialises them until they are loaded (see init_weights)."""

    def __init__(self, config):
        super().__init__()
        self.raw_config, self.config = config, parse_config(config)
        c = self.config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": Embedding(c.vocab_size, c.hidden_size),
                "layers": nn.ModuleList([Block(c) for _ in range(c.num_hidden_layers)]),
                "norm": RMSNorm(c.hidden_size, c.rms_norm_eps),
            }
        )
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)
        self.compute_dtype = None  # None: that of the weights. Training sets bf16 here over fp32 weights

    def compile(self):
        """Has torch.compile fuse the elementwise work between the matmuls of a block; attention, whose lengths change, stays as it
        is. One graph serves all blocks and all lengths."""
        for block in self.model["layers"]:
            block.before_attention = torch.compile(block.before_attention, dynamic=True)
            block.after_attention = torch.compile(block.after_attention, dynamic=True)

    @property
    def head_weight(self):
        """(V, C), the matrix that turns hidden states into logits."""
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self):
        return self.head_weight.device

    def new_cache(self, rows, max_len, device=None):
        """An empty KVCache for this model, on its device or another."""
        return KVCache(self.config, rows, max_len, self.compute_dtype or self.head_weight.dtype, device or self.device)

    def hidden(self, input_ids, lengths=None, cache=None, at=None):
        """The hidden states after the last norm: (B, T) -> (B, T, C), or (B, N, C) of the positions at (N,) alone.

        at: the positions that anybody looks at, such as those before supervised tokens. The last block computes the others as
        far as its keys and values, which these look at, and no further.
        lengths: the documents' lengths when input_ids is one packed row (1, sum(lengths)).
        cache: a KVCache; document i then continues its row i, and the row grows by lengths[i]. Without lengths,
        input_ids (rows, 1) is the next token of every row, which stands at cache.positions (see attend_step).
        """
        T = input_ids.shape[1]
        if lengths is None:
            positions = torch.arange(T) if cache is None else cache.positions[:, None]  # (T,) or (rows, 1)
        else:
            if input_ids.shape[0] != 1 or sum(lengths) != T:
                raise ValueError(f"lengths sum to {sum(lengths)}; the packed row has shape {tuple(input_ids.shape)}")
            starts = [0] * len(lengths) if cache is None else cache.lengths
            positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths)])
        x = self.model["embed_tokens"](input_ids)
        x = x.to(self.compute_dtype or x.dtype)  # (B, T, C)
        rope = rope_table(to_device(positions, x.device), self.config, x.dtype)
        *blocks, last = self.model["layers"]
        for i, block in enumerate(blocks):
            x = block(x, rope, lengths, cache, i)
        x = last(x, rope, lengths, cache, len(blocks), at)
        if cache is not None and lengths is not None:
            cache.lengths[: len(lengths)] = [s + n for s, n in zip(starts, lengths)]
        return self.model["norm"](x)

    def head(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        return project(x, self.head_weight)

    def forward(self, input_ids, lengths=None, at=None, targets=None):
        """-> logits (B, T, V); or, of a packed row, the log-probabilities (N,) of targets (N,) by the states at the positions
        at (N,).

        Training asks for the latter here and not through hidden(): sharded weights are whole only inside forward.
        """
        hidden = self.hidden(input_ids, lengths, at=at)
        return self.head(hidden) if targets is None else token_logps(hidden[0], self.head_weight, targets)

    @classmethod
    def from_pretrained(cls, source, dtype=torch.float32, device="cpu"):
        """source: hub id, directory, .pt file or an open Checkpoint. InputError names every tensor that does not fit."""
        ckpt = source if isinstance(source, Checkpoint) else Checkpoint(source)
        parse_config(ckpt.config, f"{ckpt.source}/config.json")
        with torch.device("meta"):  # no memory and no time spent on weights that are about to be replaced
            m = cls(ckpt.config)
        want = {name: tuple(p.shape) for name, p in m.named_parameters()}
        have = {name: ckpt.shape(name) for name in ckpt.names}
        faults = [f"missing {n}" for n in want if n not in have] + [f"unknown {n}" for n in have if n not in want]
        faults += [f"{n} is {have[n]}, the config says {want[n]}" for n in want if n in have and have[n] != want[n]]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise InputError(f"{ckpt.source}: tensors do not fit the config: {'; '.join(faults[:5])}{more}")
        state = {}
        for n in want:
            stored = ckpt.tensor(n)
            state[n] = stored.to(device=device, dtype=dtype, copy=True)
            release(stored)
        m.load_state_dict(state, assign=True)
        return m

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Normal(0, initializer_range) for matrices, zero biases, unit norms: what Qwen2 starts from before pre-training."""
        for p_name, p in self.named_parameters():
            if p.ndim > 1:
                p.normal_(0.0, self.raw_config.get("initializer_range", 0.02), generator=generator)
            else:
                p.fill_(1.0 if p_name.endswith("norm.weight") else 0.0)
        return self

    def save(self, out, files, dtype=None):
        """Writes a directory, or a .pt file by the suffix of out. files: the side files, as Checkpoint.files has them."""
        state = {n: p.detach() for n, p in self.named_parameters()}
        specs = {n: (tuple(p.shape), dtype or p.dtype) for n, p in state.items()}
        tensors = ((n, p.to(device="cpu", dtype=specs[n][1])) for n, p in state.items())
        write_checkpoint(out, self.raw_config, files, specs, tensors)


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h W^T)[target] of each row, over W in tiles of `columns` words: no (N, V) tensor is ever there.

    hidden: (N, C), weight: (V, C) in any dtype, targets: (N,) -> (N,) fp32. The softmax is taken in fp32, its sum tile by
    tile relative to the largest logit so far. The backward makes the logits again: each tile has its own part of the
    weight's gradient, and adds to that of the states. d logp / d logits = onehot(target) - softmax(logits).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, columns):
        own, total = torch.zeros(2, len(hidden), device=hidden.device)
        top = torch.full_like(own, -torch.inf)
        for start, w in tiles(weight, hidden.dtype, columns):
            logits = tile_logits(hidden, w)  # (N, columns)
            at, inside = in_tile(targets, start, len(w))
            own = torch.where(inside, logits.gather(1, at[:, None])[:, 0], own)
            below, top = top, torch.maximum(top, logits.amax(-1))
            total = total * (below - top).exp() + logits.sub_(top[:, None]).exp_().sum(-1)
        ctx.save_for_backward(hidden, weight, targets, top + total.log())
        ctx.columns = columns
        return (own - top) - total.log()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, lse = ctx.saved_tensors
        d_hidden = torch.zeros(hidden.shape, device=hidden.device)  # in fp32, whatever the dtype of what it sums
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start, w in tiles(weight, hidden.dtype, ctx.columns):
            d_logits = tile_logits(hidden, w).sub_(lse[:, None]).exp_().mul_(-grad[:, None])
            at, inside = in_tile(targets, start, len(w))
            d_logits.scatter_add_(1, at[:, None], torch.where(inside, grad, 0.0)[:, None])
            d_logits = d_logits.to(hidden.dtype)
            if hidden.dtype == torch.float32:
                d_hidden.addmm_(d_logits, w)
            else:
                d_hidden += d_logits @ w
            if d_weight is not None:
                d_w = d_weight[start : start + len(w)]
                if d_w.dtype == hidden.dtype:
                    torch.mm(d_logits.T, hidden, out=d_w)
                else:
                    d_w.copy_(d_logits.T @ hidden)
        return d_hidden.to(hidden.dtype), d_weight, None, None


def tiles(weight, dtype, columns):
    """Yields (the first word, the rows of weight (V, C) for it and the next ones, `columns` in all) in a dtype."""
    for start in range(0, len(weight), columns):
        yield start, weight[start : start + columns].to(dtype)


def tile_logits(hidden, w):
    """(N, C), (columns, C) -> (N, columns) fp32; on a GPU they leave a matmul of bf16 as the fp32 that it sums in."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, w.T, out_dtype=torch.float32)
    return (hidden @ w.T).float()


def in_tile(targets, start, size):
    """-> (the targets' places in the tile of `size` words from `start` on, or one of its ends; whether they lie in it)."""
    at = targets - start
    return at.clamp(0, size - 1), (at >= 0) & (at < size)


def token_logps(hidden, weight, targets):
    """The log-probability of each target. hidden: (N, C), weight: (V, C), targets: (N,) -> (N,) fp32."""
    if len(targets) == 0:
        return hidden.sum(-1).float()  # (0,), still part of the graph
    return TokenLogProbs.apply(hidden, weight, targets, head_columns(hidden.device.type))
