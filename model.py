"""Qwen2 in plain PyTorch: the forward pass, the KV cache, and checkpoints in and out. Imports nothing of the project.

    m = Qwen2.from_pretrained("Qwen/Qwen2-0.5B-Instruct")     # a hub id, a Hugging Face directory or a .pt file
    logits = m(input_ids)                                     # (B, T) -> (B, T, V)

Several documents may lie in one row without padding: m.hidden(ids, lengths=[3, 5]) with ids (1, 8). Positions restart
with each document and none sees another. Tensor names are Hugging Face's, so a state dict is a checkpoint.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


class InputError(Exception):
    """Bad input from outside. The message is one line: file, line, what is wrong, what to do. See cli()."""


@dataclass(frozen=True)
class Config:
    """The numbers of a config.json that shape the forward pass, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int


def parse_config(raw, where="config.json"):
    """config.json as a dict -> Config. What this file does not implement raises InputError instead of being ignored."""

    def refuse(what):
        raise InputError(f"{where}: {what}: this code implements plain Qwen2 only")

    if raw.get("model_type") != "qwen2":
        refuse(f"model_type is {raw.get('model_type')!r}, not 'qwen2'")
    rope = raw.get("rope_parameters") or {}  # transformers >= 5 keeps rope_theta in here
    scaling = {**(raw.get("rope_scaling") or {}), **rope}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        refuse(f"rope scaling {scaling} is asked for")
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    if raw.get("use_sliding_window") or layer_types != {"full_attention"}:
        refuse("sliding-window attention is asked for")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is {raw['hidden_act']!r}, not 'silu'")
    if raw.get("quantization_config"):
        refuse("the weights are quantised")
    try:
        n_heads = int(raw["num_attention_heads"])
        config = Config(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=n_heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or n_heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // n_heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=int(raw.get("max_position_embeddings", 32768)),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{where}: {e} is missing or not a number") from None
    if config.num_attention_heads % config.num_key_value_heads:
        refuse(f"{config.num_attention_heads} query heads do not divide into {config.num_key_value_heads} key-value heads")
    return config


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
    what the machine has left is enough, and only for fp32 on a CPU with oneDNN.
    """
    weights = [p for p in m.parameters() if p.ndim == 2 and p is not m.model["embed_tokens"].weight or p is m.head_weight]
    size = sum(p.numel() * p.element_size() for p in weights)
    fits = torch.backends.mkldnn.is_available() and 2 * size < available_memory()
    if fits and all(p.is_cpu and p.dtype == torch.float32 for p in weights):
        for p in weights:
            p.packed = torch.ops.mkldnn._reorder_linear_weight(p.detach(), 64)
    try:
        yield
    finally:
        for p in weights:
            p.packed = None


def available_memory():
    """Bytes that a process may take without swapping; 0 where the system does not say (not Linux)."""
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


class Linear(nn.Linear):
    def forward(self, x):
        return project(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * h.to(x.dtype)


def rope_table(positions, config, dtype):
    """cos and sin of the rotary angles (arXiv 2104.09864), half-split: dimension i turns with i + D/2.

    positions: (T,) or (B, T) integers -> two tensors (..., T, D). The angles are fp32 whatever the dtype.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[..., None].float() / config.rope_theta**exponent  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., T, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x, cos, sin):
    """x: (B, H, T, D), rotated."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def attend(q, k, v):
    """Causal attention, the last query at the last key. q: (B, Hq, Tq, D); k, v: (B, Hkv, Tk, D), Tk >= Tq."""
    Tq, Tk = q.shape[2], k.shape[2]
    mask = None
    if 1 < Tq < Tk:  # a continuation of several tokens: query i sees keys 0 .. Tk - Tq + i
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=Tq == Tk, enable_gqa=True)


def attend_documents(q, k, v, lengths):
    """Causal attention inside each document of one packed row, sum(lengths) = T. q: (1, Hq, T, D); k, v: (1, Hkv, T, D)."""
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
    return torch.cat([attend(*part) for part in parts], dim=2)


class KVCache:
    """Keys and values of `rows` sequences, each of its own length. Rows in use are always the first `len(lengths)`.

    k, v: (layers, rows, Hkv, max_len, D). lengths: the tokens held by each row in use.
    """

    def __init__(self, config, rows, max_len, dtype=torch.float32, device="cpu"):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, max_len, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = []

    @property
    def bytes(self):
        return 2 * self.k.numel() * self.k.element_size()

    def remove(self, row):
        """Frees a row: the last row in use moves into its place."""
        last = self.lengths.pop()
        if row < len(self.lengths):
            self.k[:, row, :, :last], self.v[:, row, :, :last] = (
                x[:, len(self.lengths), :, :last] for x in (self.k, self.v)
            )
            self.lengths[row] = last

    def extend(self, layer, k, v, starts, lengths):
        """Writes packed k, v (1, Hkv, sum(lengths), D): document i goes to row i, from position starts[i] on."""
        ones = decoding_rows(lengths)
        at = torch.arange(ones, device=k.device), slice(None), torch.tensor(starts[:ones], dtype=torch.long, device=k.device)
        for cached, new in ((self.k[layer], k[0]), (self.v[layer], v[0])):  # (rows, Hkv, max_len, D), (Hkv, T, D)
            cached[at] = new[:, :ones].transpose(0, 1)
            for row, part in enumerate(new[:, ones:].split(lengths[ones:], 1), ones):
                cached[row, :, starts[row] : starts[row] + lengths[row]] = part


def decoding_rows(lengths):
    """How many of the first documents bring a single new token; generation keeps those before the longer ones."""
    return next((i for i, n in enumerate(lengths) if n != 1), len(lengths))


def attend_cached(q, cache, layer, starts, lengths):
    """Each document's new queries over its row of the cache. q: (1, Hq, T, D) packed -> the same shape."""
    (_, Hq, _, D), Hkv, parts, ones = q.shape, cache.k.shape[2], [], decoding_rows(lengths)
    if ones:
        # One new token a row, the decoding step: one call for all rows. The query heads of a group stand as so many
        # queries of their key-value head, so the cache is read once and never repeated.
        ends = torch.tensor(starts[:ones], device=q.device) + 1
        k, v = (x[layer, :ones, :, : max(starts[:ones]) + 1] for x in (cache.k, cache.v))  # (n, Hkv, T, D)
        mask = torch.arange(k.shape[2], device=q.device) < ends[:, None, None, None]  # (n, 1, 1, T)
        grouped = q[0, :, :ones].transpose(0, 1).reshape(ones, Hkv, Hq // Hkv, D)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        parts.append(out.reshape(ones, Hq, D).transpose(0, 1)[None])  # (1, Hq, n, D)
    for row, q_i in enumerate(q[:, :, ones:].split(lengths[ones:], 2), ones):
        if lengths[row]:
            end = starts[row] + lengths[row]
            parts.append(attend(q_i, cache.k[layer, row : row + 1, :, :end], cache.v[layer, row : row + 1, :, :end]))
    return torch.cat(parts, dim=2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=True)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=True)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=True)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope, lengths, cache, layer):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)  # (B, Hq, T, D), (B, Hkv, T, D)
        if cache is not None:
            starts = cache.lengths[: len(lengths)]
            cache.extend(layer, k, v, starts, lengths)
            y = attend_cached(q, cache, layer, starts, lengths)
        elif lengths is not None:
            y = attend_documents(q, k, v, lengths)
        else:
            y = attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, lengths, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """config: a config.json as a dict. Weights are as torch initialises them until they are loaded (see init_weights)."""

    def __init__(self, config):
        super().__init__()
        self.raw_config, self.config = config, parse_config(config)
        c = self.config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                "layers": nn.ModuleList([Block(c) for _ in range(c.num_hidden_layers)]),
                "norm": RMSNorm(c.hidden_size, c.rms_norm_eps),
            }
        )
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)
        self.compute_dtype = None  # None: that of the weights. Training sets bf16 here over fp32 weights

    @property
    def head_weight(self):
        """(V, C), the matrix that turns hidden states into logits."""
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self):
        return self.head_weight.device

    def hidden(self, input_ids, lengths=None, cache=None):
        """The hidden states after the last norm: (B, T) -> (B, T, C).

        lengths: the documents' lengths when input_ids is one packed row (1, sum(lengths)).
        cache: a KVCache; document i then continues its row i, and the row grows by lengths[i].
        """
        T = input_ids.shape[1]
        if lengths is None:
            positions = torch.arange(T)
        else:
            if input_ids.shape[0] != 1 or sum(lengths) != T:
                raise ValueError(f"lengths sum to {sum(lengths)}; the packed row has shape {tuple(input_ids.shape)}")
            starts = [0] * len(lengths) if cache is None else cache.lengths
            positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths)])
        x = self.model["embed_tokens"](input_ids)
        x = x.to(self.compute_dtype or x.dtype)  # (B, T, C)
        rope = rope_table(positions.to(x.device), self.config, x.dtype)
        for i, block in enumerate(self.model["layers"]):
            x = block(x, rope, lengths, cache, i)
        if cache is not None:
            cache.lengths[: len(lengths)] = [s + n for s, n in zip(starts, lengths)]
        return self.model["norm"](x)

    def head(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        return project(x, self.head_weight)

    def forward(self, input_ids, lengths=None):
        return self.head(self.hidden(input_ids, lengths))

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
        state = {n: ckpt.tensor(n).to(device=device, dtype=dtype, copy=True) for n in want}
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
    """log softmax(h W^T)[target], row by row, in chunks: no (N, V) tensor outlives its chunk; the backward recomputes it.

    hidden: (N, C), weight: (V, C) in any dtype, targets: (N,) -> (N,) fp32. The softmax is taken in fp32.
    d logp / d logits = onehot(target) - softmax(logits).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        w = weight.to(hidden.dtype)
        logps, lses = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = (h @ w.T).float()  # (chunk, V)
            lses.append(logits.logsumexp(-1))
            logps.append(logits.gather(1, t[:, None])[:, 0] - lses[-1])
        lse = torch.cat(lses)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk = chunk
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, lse = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        pieces = (x.split(ctx.chunk) for x in (hidden, targets, lse, grad, d_hidden))
        for h, t, z, g, d_h in zip(*pieces):
            d_logits = (h @ w.T).float().sub_(z[:, None]).exp_().mul_(-g[:, None])  # (chunk, V)
            d_logits.scatter_add_(1, t[:, None], g[:, None])
            d_logits = d_logits.to(h.dtype)
            torch.mm(d_logits, w, out=d_h)
            if d_weight is not None:
                if d_weight.dtype == h.dtype:
                    d_weight.addmm_(d_logits.T, h)
                else:
                    d_weight += d_logits.T @ h
        return d_hidden, d_weight, None, None


def token_logps(hidden, weight, targets):
    """The log-probability of each target. hidden: (N, C), weight: (V, C), targets: (N,) -> (N,) fp32."""
    if len(targets) == 0:
        return hidden.sum(-1).float()  # (0,), still part of the graph
    chunk = max(1, 2**26 // weight.shape[0])  # logits of a chunk: 256 MiB in fp32, rows enough to keep the matmul busy
    return TokenLogProbs.apply(hidden, weight, targets, chunk)


# ---------------------------------------------------------------------------------------------------------------------
# Files

# What a checkpoint carries beside its weights and config.json and hands on to those made from it; all of it text.
SIDE_FILES = (
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja"
).split()
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def cli(main):
    """Runs a script's main(). Bad input ends with one line on stderr and exit code 2, Ctrl-C with 130."""
    try:
        main()
    except InputError as e:
        if os.environ.get("RANK", "0") == "0":  # under torchrun all ranks meet the same error
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a temporary file beside `path`; on success it takes the name, on failure nothing is left."""
    path = os.path.abspath(path)
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}") from None


class Checkpoint:
    """A checkpoint opened for reading, one tensor at a time.

    source: a hub id, a Hugging Face directory (one or many safetensors), or a .pt file written by this project.
    config: config.json as a dict. files: {name: text} of SIDE_FILES. names: the tensors, sorted; a tied lm_head.weight
    is not among them. Nothing is unpickled but tensors and plain containers. InputError says what is missing or broken.
    """

    def __init__(self, source):
        self.source = str(source)
        if os.path.isdir(self.source):
            self._open_directory(self.source)
        elif os.path.isfile(self.source):
            self._open_pt(self.source)
        else:
            self._open_directory(download(self.source))
        self.names = sorted(self._where)
        if self.config.get("tie_word_embeddings") and "lm_head.weight" in self.names:
            embed = "model.embed_tokens.weight"
            if embed in self._where and not torch.equal(self.tensor("lm_head.weight"), self.tensor(embed)):
                raise InputError(f"{self.source}: tie_word_embeddings is true, but lm_head.weight differs from {embed}")
            self.names.remove("lm_head.weight")

    def _open_directory(self, path):
        self.config = read_json(os.path.join(path, "config.json"))
        self.files = {}
        for name in SIDE_FILES:
            if os.path.isfile(os.path.join(path, name)):
                with open(os.path.join(path, name), encoding="utf-8") as f:
                    self.files[name] = f.read()
        index = os.path.join(path, "model.safetensors.index.json")
        if os.path.isfile(index):
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        else:
            shards = sorted(n for n in os.listdir(path) if n.endswith(".safetensors"))
        if not shards:
            raise InputError(f"{path}: no *.safetensors file in this directory; weights in other formats are not read")
        self._where = {}
        for shard in (os.path.join(path, s) for s in shards):
            try:
                f = safe_open(shard, framework="pt")
            except (SafetensorError, OSError) as e:
                raise InputError(f"{shard}: missing or corrupt ({e}); fetch it again") from None
            self._where |= {name: f for name in f.keys()}

    def _open_pt(self, path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.config, self._where = content["config"], content["weights"]
            self.files = {name: text for name, text in content["files"].items() if name in SIDE_FILES}
        except pickle.UnpicklingError:
            raise InputError(f"{path}: holds more than tensors and plain data (or is no .pt file); not loaded") from None
        except (RuntimeError, OSError, EOFError) as e:
            raise InputError(f"{path}: missing or corrupt ({str(e).splitlines()[0]})") from None
        except (KeyError, TypeError, IndexError, AttributeError):
            raise InputError(f"{path}: a .pt checkpoint of this project has the keys config, files, weights") from None

    def tensor(self, name):
        """The tensor in its stored dtype, on the CPU, read now."""
        f = self._where[name]
        return f if isinstance(f, torch.Tensor) else f.get_tensor(name)

    def shape(self, name):
        f = self._where[name]
        return tuple(f.shape if isinstance(f, torch.Tensor) else f.get_slice(name).get_shape())

    def dtype(self, name):
        f = self._where[name]
        if isinstance(f, torch.Tensor):
            return f.dtype
        code = f.get_slice(name).get_dtype()
        return next((d for d, c in SAFETENSORS_DTYPES.items() if c == code), None) or self.tensor(name).dtype

    def fingerprint(self):
        """SHA-256 of architecture, weights and tokenizer: equal for a directory and a .pt of the same model."""
        h = hashlib.sha256(repr(parse_config(self.config, self.source)).encode())
        for name in self.names:
            t = self.tensor(name).contiguous()
            h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            h.update(t.view(-1).view(torch.uint8).numpy())
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            h.update(f"{name} {self.files.get(name)}".encode())
        return h.hexdigest()


def download(repo):
    """A hub id -> the directory of its files: configuration, tokenizer, safetensors, nothing else."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"{repo}: no such checkpoint: give a directory, a .pt file or a hub id such as Qwen/Qwen2-0.5B-Instruct")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repo, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json", *SIDE_FILES])
    except Exception as e:  # the client raises many kinds, of its own and of its HTTP library
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{repo}: no such directory here, and the hub did not give it: {reason}") from None


def write_checkpoint(out, config, files, specs, tensors):
    """Writes a checkpoint, whole or not at all: a directory that transformers and vLLM load, or a .pt by the suffix.

    config: dict. files: {name: text}. specs: {name: (shape, dtype)}. tensors: (name, tensor) pairs in the order of
    specs, taken one at a time, so that a directory is written without ever holding the model.
    """
    dtypes = {str(dtype).removeprefix("torch.") for _, dtype in specs.values()}
    if len(dtypes) == 1:
        config = {**config, "dtype" if "dtype" in config else "torch_dtype": dtypes.pop()}
    if out.endswith(".pt"):
        with atomic_write(out, "wb") as f:
            torch.save({"config": config, "files": files, "weights": {n: t.contiguous() for n, t in tensors}}, f)
        return
    out = os.path.abspath(out)
    if os.path.isdir(out) and os.listdir(out) and not os.path.isfile(os.path.join(out, "config.json")):
        raise InputError(f"{out}: exists and is no checkpoint; give another --out")
    temporary = f"{out}.tmp{os.getpid()}"
    try:
        for name, text in {**files, "config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}.items():
            with atomic_write(os.path.join(temporary, name)) as f:
                f.write(text)
        with atomic_write(os.path.join(temporary, "model.safetensors"), "wb") as f:
            write_safetensors(f, specs, tensors)
        if os.path.isdir(out):  # rename cannot replace a directory that is not empty
            os.rename(out, f"{temporary}.old")
        os.rename(temporary, out)
    finally:
        for leftover in (temporary, f"{temporary}.old"):
            shutil.rmtree(leftover, ignore_errors=True)


def write_safetensors(f, specs, tensors):
    """The safetensors format, streamed: 8 bytes of header length, a JSON header, then the tensors' bytes in order."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in specs.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data start on a multiple of 8 bytes
    f.write(len(head).to_bytes(8, "little") + head)
    for (name, (shape, dtype)), (got, t) in zip(specs.items(), tensors, strict=True):
        if (got, tuple(t.shape), t.dtype) != (name, tuple(shape), dtype):
            raise ValueError(f"expected {name} {shape} {dtype}, was given {got} {tuple(t.shape)} {t.dtype}")
        f.write(t.contiguous().view(-1).view(torch.uint8).numpy())
