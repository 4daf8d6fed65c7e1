"""Qwen2 in plain PyTorch. Read it from top to bottom.

    model = Qwen2.from_pretrained("Qwen/Qwen2-0.5B-Instruct")        # hub id, Hugging Face folder or .pt file
    logits = model(input_ids)                                        # (B, T) -> (B, T, V)
    logits = model(packed_ids, lengths=[3, 5], at=positions)         # (1, 8) -> (N, V)
    logps = model(packed_ids, [3, 5], at=positions, targets=tokens)  # (N,)
    logps, kl = model(packed_ids, [3, 5], positions, tokens, ref)    # (N,) each

lengths packs several documents into one row without padding: positions restart with each document, and no document sees
another. Parameter names are Hugging Face's, so a state dict is a checkpoint.
"""

import os
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from core.attention import KVCache, LayerCache, attention, cached_attention
from core.checkpoint import Checkpoint, all_finite, write_checkpoint
from core.config import Config, parse_config
from core.devices import to_device
from core.distributed import is_sharded
from core.files import InputError
from core.head import token_kl, token_logps
from core.layers import Embedding, Linear, RMSNorm, fused, normed_linears, swiglu_linear
from core.pages import release


def rope_table(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary embedding (arXiv 2104.09864): positions (T,) or (B, T) -> cosines and sines, (..., T, D) each.

    Half-split, as in Hugging Face's checkpoints: dimension i < D/2 rotates with i + D/2. The first half of the sines is
    negated, ready for apply_rope. Angles are computed in fp32.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[..., None].float() / config.rope_theta**exponent  # (..., T, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (..., T, D)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, T, H, D) by the angles of rope_table."""
    return (x * cos[..., None, :]).addcmul_(x.roll(x.shape[-1] // 2, -1), sin[..., None, :])


class Attention(nn.Module):
    """Grouped-query attention. forward takes the preceding norm as an argument, so that the two can be fused."""

    def __init__(self, config: Config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = Linear(C, config.num_attention_heads * D, bias=True)
        self.k_proj = Linear(C, config.num_key_value_heads * D, bias=True)
        self.v_proj = Linear(C, config.num_key_value_heads * D, bias=True)
        self.o_proj = Linear(config.num_attention_heads * D, C, bias=False)

    def rotated_heads(self, x: Tensor, norm: nn.Module, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, T, Hq, D), k and v (B, T, Hkv, D)."""
        q, k, v = normed_linears(x, norm, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def forward(
        self,
        x: Tensor,
        norm: nn.Module,
        rope: tuple[Tensor, Tensor],
        lengths: list[int] | None = None,
        cache: LayerCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, N, C) at the positions `at` (N,). cache: this block's part of a KVCache."""
        q, k, v = self.rotated_heads(x, norm, rope)
        if cache is None:
            y = attention(q, k, v, lengths)  # (B, T, Hq, D)
        else:
            y = cached_attention(q, k, v, cache, lengths)
        if at is not None:
            y = y.index_select(1, at)
        return self.o_proj(y.flatten(-2))


class MLP(nn.Module):
    """SwiGLU. forward takes the preceding norm as an argument, as in Attention."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        gate, up = normed_linears(x, norm, self.gate_proj, self.up_proj)  # (B, T, I) each
        return swiglu_linear(gate, up, self.down_proj)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        lengths: list[int] | None = None,
        cache: LayerCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, N, C) at the positions `at` (N,)."""
        y = self.self_attn(x, self.input_layernorm, rope, lengths, cache, at)
        if at is not None:
            x = x.index_select(1, at)
        x = x + y
        return x + self.mlp(x, self.post_attention_layernorm)


class Qwen2(nn.Module):
    """config: a config.json as a dict. See init_weights and from_pretrained for the weights."""

    def __init__(self, config: dict):
        super().__init__()
        fused()  # raises for an unknown value of KERNELS
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
        self.compute_dtype: torch.dtype | None = None  # None: the weights' dtype. --dtype bf16: bf16 over fp32 weights
        # training.setup sets these if memory is free
        self.spare_bytes = 0  # bytes in which the head may keep its logits (core.head)
        self.casts: list[tuple[Tensor, Tensor]] = []  # the weights' copies in compute_dtype (core.casts)

    def forward(
        self,
        input_ids: Tensor,
        lengths: list[int] | None = None,
        at: Tensor | None = None,
        targets: Tensor | None = None,
        ref: "Qwen2 | None" = None,
        forward_kl: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input_ids (B, T) -> logits (B, T, V).

        at (N,): positions of one packed row (1, T) -> logits (N, V) there. targets (N,): tokens -> their
        log-probabilities (N,) in fp32 at those positions, without the logits in memory.
        ref: the frozen reference model -> (log-probabilities, KL over the whole vocabulary), (N,) each.
        The KL is KL(self || ref), with forward_kl KL(ref || self); see core.head.token_kl.
        In training, call the model and not its methods: --shard gathers the weights only inside forward.
        """
        hidden = self.hidden(input_ids, lengths, at=at, head_follows=targets is not None and len(targets) > 0)
        if at is not None:
            hidden = hidden[0]  # (N, C)
        if at is None or targets is None:
            return self.head(hidden)
        logps = token_logps(hidden, self.head_weight, targets, self.spare_bytes)
        if ref is None:
            return logps
        return logps, ref.kl_to_policy(hidden, self.head_weight, input_ids, lengths, at, forward_kl)

    def kl_to_policy(
        self,
        policy_hidden: Tensor,
        policy_head: Tensor,
        input_ids: Tensor,
        lengths: list[int] | None,
        at: Tensor,
        forward_kl: bool,
    ) -> Tensor:
        """The KL (N,) of forward(ref=self). Registered by core.distributed.shard, so that it gathers weights too."""
        with torch.no_grad():
            hidden = self.hidden(input_ids, lengths, at=at)[0]
        return token_kl(policy_hidden, policy_head, hidden, self.head_weight, forward_kl)

    def hidden(
        self,
        input_ids: Tensor,
        lengths: list[int] | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
        head_follows: bool = False,
    ) -> Tensor:
        """Hidden states after the last norm: input_ids (B, T) -> (B, T, C).

        lengths: input_ids is one packed row (1, sum(lengths)) of documents of these lengths.
        cache: document i continues row i, which grows by lengths[i]. Without lengths, input_ids (rows, 1) has one
        token for every row, at cache.positions (see KVCache).
        at (N,): compute outputs only at these positions -> (B, N, C); the last block skips the rest.
        head_follows: the loss also runs the head. The gradient of a tied embedding may then be sparse.
        """
        positions = token_positions(input_ids, lengths, cache)  # (T,), or (rows, 1) in a decoding step
        if cache is not None and lengths is None:
            cache.begin_step()
        x = self.model["embed_tokens"](input_ids, sparse=head_follows and self.sparse_gradient_pays())
        x = x.to(self.compute_dtype or x.dtype)  # (B, T, C)
        rope = rope_table(to_device(positions, x.device), self.config, x.dtype)
        last = self.config.num_hidden_layers - 1
        for i, block in enumerate(self.model["layers"]):
            x = block(x, rope, lengths, cache and cache.layer(i), at if i == last else None)
        if cache is not None and lengths is not None:
            cache.lengths[: len(lengths)] = [start + n for start, n in zip(cache.lengths, lengths)]
        return self.model["norm"](x)

    def sparse_gradient_pays(self) -> bool:
        """True on a CPU with tied weights: the embedding's gradient is then added to the head's, row by row.

        A dense gradient would be a second (V, C) matrix, nearly all zeros. In bf16 it took 7 % of a micro-batch of the
        0.5B.
        """
        return self.config.tie_word_embeddings and self.device.type == "cpu" and fused() and not is_sharded(self)

    def head(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        return self.model["embed_tokens"].logits(x) if self.config.tie_word_embeddings else self.lm_head(x)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, C)."""
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def new_cache(self, rows: int, max_len: int, device: torch.device | str | None = None) -> KVCache:
        """An empty KVCache for this model, on its device or another."""
        return KVCache(self.config, rows, max_len, self.compute_dtype or self.head_weight.dtype, device or self.device)

    def prefill(self, sequences: list[list[int]], cache: KVCache) -> None:
        """Fills the first rows of an empty cache with these token lists."""
        ids = to_device([[t for sequence in sequences for t in sequence]], self.device)
        self.hidden(ids, list(map(len, sequences)), cache, at=ids.new_zeros(1))

    def compile(self) -> None:
        """Compiles the code before and after attention in each block. All blocks and lengths share these two graphs.

        Attention is not compiled, because the documents' lengths change from call to call.
        """
        for block in self.model["layers"]:
            block.self_attn.rotated_heads = torch.compile(block.self_attn.rotated_heads, dynamic=True)
            block.mlp.forward = torch.compile(block.mlp.forward, dynamic=True)

    @classmethod
    def on_meta(cls, ckpt: Checkpoint) -> "Qwen2":
        """The checkpoint's model without weights, on the meta device. InputError names the tensors that do not fit."""
        layers = parse_config(ckpt.config, f"{ckpt.source}/config.json").num_hidden_layers
        if layers > len(ckpt.names):  # checked before any module is made
            raise InputError(
                f"{ckpt.source}: num_hidden_layers is {layers}, but the weights hold {len(ckpt.names)} tensors"
            )
        with torch.device("meta"):
            model = cls(ckpt.config)
        check_tensors(ckpt, {name: tuple(p.shape) for name, p in model.named_parameters()})
        return model

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike | Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Qwen2":
        """source: hub id, folder, .pt file or open Checkpoint. InputError as in on_meta, and for NaN or infinity."""
        ckpt = source if isinstance(source, Checkpoint) else Checkpoint(source)
        model = cls.on_meta(ckpt)  # allocates and initialises nothing: every weight is replaced below
        state = {}
        for name, _ in model.named_parameters():
            stored = ckpt.tensor(name)
            state[name] = check_finite(ckpt, name, stored.to(device=device, dtype=dtype, copy=True))
            release(stored)
        model.load_state_dict(state, assign=True)
        return model

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> "Qwen2":
        """Initialises as Qwen2's pre-training does: matrices Normal(0, initializer_range), biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                p.normal_(0.0, self.raw_config.get("initializer_range", 0.02), generator=generator)
            else:
                p.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return self

    def save(self, out: str, files: dict[str, str | Callable[[], str]], dtype: torch.dtype | None = None) -> None:
        """Writes a .pt file if `out` ends in .pt, else a folder. files: {name: text} as in Checkpoint.files."""
        state = {name: p.detach() for name, p in self.named_parameters()}
        specs = {name: (tuple(p.shape), dtype or p.dtype) for name, p in state.items()}
        tensors = ((name, p.to(device="cpu", dtype=specs[name][1])) for name, p in state.items())
        write_checkpoint(out, self.raw_config, files, specs, tensors)


def token_positions(input_ids: Tensor, lengths: list[int] | None, cache: KVCache | None) -> Tensor:
    """The position of each token in its document: (T,), or cache.positions (rows, 1) in a decoding step.

    ValueError if `lengths` does not sum to the length of the packed row.
    """
    T = input_ids.shape[1]
    if lengths is None:
        return torch.arange(T) if cache is None else cache.positions[:, None]
    if input_ids.shape[0] != 1 or sum(lengths) != T:
        raise ValueError(f"lengths sum to {sum(lengths)}; the packed row has shape {tuple(input_ids.shape)}")
    starts = [0] * len(lengths) if cache is None else cache.lengths
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths)])


def check_tensors(ckpt: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """InputError unless the checkpoint holds exactly the expected {name: shape}, all floating-point."""
    stored = {name: ckpt.shape(name) for name in ckpt.names}
    faults = [f"missing {name}" for name in expected if name not in stored]
    faults += [f"unknown {name}" for name in stored if name not in expected]
    for name in expected:
        if name not in stored:
            continue
        if stored[name] != expected[name]:
            faults.append(f"{name} is {stored[name]}, the config says {expected[name]}")
        if not ckpt.dtype(name).is_floating_point:
            faults.append(f"{name} is {ckpt.dtype(name)}, not floating-point")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InputError(f"{ckpt.source}: tensors do not fit the config: {'; '.join(faults[:5])}{more}")


def check_finite(ckpt: Checkpoint, name: str, t: Tensor) -> Tensor:
    """Returns t, the checkpoint's tensor of that name; InputError if it holds NaN or infinity."""
    if not t.is_meta and not all_finite(t):
        raise InputError(f"{ckpt.source}: {name} holds NaN or infinity; take an earlier save, or fetch it again")
    return t
