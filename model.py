"""Qwen2 in plain PyTorch: the forward pass, the KV cache, and the log-probabilities that training needs.

    m = Qwen2.from_pretrained("Qwen/Qwen2-0.5B-Instruct")     # a hub id, a Hugging Face directory or a .pt file
    logits = m(input_ids)                                     # (B, T) -> (B, T, V)

Several documents may lie in one row without padding: m.hidden(ids, lengths=[3, 5]) with ids (1, 8). Positions restart
with each document and none sees another. Tensor names are Hugging Face's, so a state dict is a checkpoint.
"""

import torch
import torch.nn as nn

from core.attention import KVCache, attention, to_device
from core.checkpoint import Checkpoint, all_finite, write_checkpoint
from core.config import parse_config
from core.files import InputError
from core.layers import Embedding, Linear, RMSNorm, normed_linears, project, swiglu_linear, token_logps
from core.pages import release

# ---------------------------------------------------------------------------------------------------------------------
# The forward pass


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


def check_finite(ckpt, name, t):
    """t, which is a checkpoint's tensor of that name; InputError if it holds NaN or infinity."""
    if not t.is_meta and not all_finite(t):
        raise InputError(f"{ckpt.source}: {name} holds NaN or infinity; take an earlier save, or fetch it again")
    return t


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
        """Fuses the elementwise work between the matmuls of a block with torch.compile; attention, whose lengths change, is left
        alone. One graph serves all blocks and all lengths."""
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
        input_ids (rows, 1) is the next token of every row, which stands at cache.positions (see KVCache.begin_step).
        """
        T = input_ids.shape[1]
        if lengths is None:
            positions = torch.arange(T) if cache is None else cache.positions[:, None]  # (T,) or (rows, 1)
            if cache is not None:
                cache.begin_step()
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

    def prefill(self, sequences, cache):
        """Begins the first rows of an empty cache with these token lists, from which nothing is predicted yet."""
        ids = to_device([[t for sequence in sequences for t in sequence]], self.device)
        self.hidden(ids, list(map(len, sequences)), cache, at=ids.new_zeros(1))

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
        faults += [
            f"{n} is {ckpt.dtype(n)}, no float" for n in want if n in have and not ckpt.dtype(n).is_floating_point
        ]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise InputError(f"{ckpt.source}: tensors do not fit the config: {'; '.join(faults[:5])}{more}")
        state = {}
        for n in want:
            stored = ckpt.tensor(n)
            state[n] = check_finite(ckpt, n, stored.to(device=device, dtype=dtype, copy=True))
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
