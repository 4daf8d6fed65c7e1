"""Causal attention within each document of a packed row, and over a KV cache for generation.

Every path calls F.scaled_dot_product_attention, or torch's variable-length kernel for packed rows on a GPU.
Names in shapes: B rows, T tokens, Hq query heads, Hkv key-value heads, D numbers per head.
"""

import functools
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import Config
from core.devices import to_device
from core.layers import fused

# cuDNN makes a plan for every new shape, and with packed rows nearly every call has one.
torch.backends.cuda.enable_cudnn_sdp(False)


# ---------------------------------------------------------------------------------------------------------------------
# Without a cache


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Causal attention in each row, or with lengths in each document of one packed row (B = 1, T = sum(lengths)).

    q: (B, T, Hq, D); k, v: (B, T, Hkv, D) -> (B, T, Hq, D).
    """
    if lengths is not None:
        return attend_documents(q, k, v, lengths)
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; the last query is at the position of the last key.

    q: (B, Hq, Tq, D); k, v: (B, Hkv, Tk, D) with Tk >= Tq -> (B, Hq, Tq, D).
    """
    Tq, Tk = q.shape[2], k.shape[2]
    mask = None
    if 1 < Tq < Tk:  # several tokens after cached ones: query i sees keys 0 .. Tk - Tq + i
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):  # these CUDA kernels take no grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=Tq == Tk, enable_gqa=True)


def attend_documents(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention within each document of a packed row, one document at a time.

    q: (1, T, Hq, D); k, v: (1, T, Hkv, D) -> (1, T, Hq, D). Fused: one kernel for all documents, where a GPU has it.
    """
    if has_varlen_kernel(q) and fused():
        return varlen_attention(q[0], k[0], v[0], lengths)[None]
    parts = []
    for part in zip(*(x.split(lengths, 1) for x in (q, k, v))):
        q_i, k_i, v_i = (x.transpose(1, 2) for x in part)  # (1, H, T_i, D)
        if repeat_pays(k_i) and fused():
            k_i, v_i = (x.repeat_interleave(q_i.shape[1] // x.shape[1], dim=1) for x in (k_i, v_i))
        if attends_in_fp32(k_i) and fused():
            q_i, k_i, v_i = (x.float() for x in (q_i, k_i, v_i))
        parts.append(attend(q_i, k_i, v_i).to(q.dtype).transpose(1, 2))
    return torch.cat(parts, dim=1)


def repeat_pays(k: Tensor) -> bool:
    """True if repeating the key-value heads speeds up the backward of k (1, Hkv, T, D) on a CPU.

    The backward gives each thread whole key-value heads. If the threads do not divide their number, some threads idle.
    Repeating the heads is cheaper than that only in long documents: 56 instead of 76 ms (docs/LOG.md, 2026-11-22).
    """
    return k.is_cpu and k.requires_grad and k.shape[2] > 256 and k.shape[1] % torch.get_num_threads() != 0


def attends_in_fp32(k: Tensor) -> bool:
    """True if the document with keys k (1, H, T, D) attends in fp32: in bf16 on a CPU, if it has at most 256 tokens.

    There fp32 makes the backward at least three times as fast. Forwards without a backward also run in fp32, so that a
    model's log-probabilities are the same in training and as a reference.
    """
    return k.is_cpu and k.dtype == torch.bfloat16 and k.shape[2] <= 256


def has_varlen_kernel(q: Tensor) -> bool:
    """True on GPUs from Ampere (compute capability 8.0) on, in 16-bit dtypes, if D <= 256 is a multiple of 8. q: (..., D)."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], key_lengths: list[int] | None = None
) -> Tensor:
    """attend_documents with torch's variable-length kernel. q: (T, Hq, D); k, v: (T, Hkv, D) -> (T, Hq, D).

    key_lengths: the keys of each document if it has more keys than queries. Its last query sees all of them.

    window_size (-1, 0) means causal: any number of keys back, none ahead. From torch 2.12 on, grouped queries need
    enable_gqa; before, they were always allowed.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    counts = lengths, lengths if key_lengths is None else key_lengths
    ends = [document_ends(tuple(n), q.device) for n in counts]
    q, k, v = (x.contiguous() for x in (q, k, v))
    return varlen_attn(q, k, v, *ends, *map(max, counts), window_size=(-1, 0), **options)


@functools.lru_cache(maxsize=4)  # all layers of a forward use the same tensor
def document_ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(0, l1, l1 + l2, ...) as int32 on the device."""
    return to_device(F.pad(torch.tensor(lengths), (1, 0)).cumsum(0, dtype=torch.int32), device)


# ---------------------------------------------------------------------------------------------------------------------
# The KV cache


class KVCache:
    """Keys and values of `rows` sequences of different lengths. Sequence i is row i.

    k, v: (layers, rows, Hkv, max_len, D). Two ways to add tokens:

    - Packed (hidden(ids, lengths, cache)): document i adds lengths[i] tokens to row i. The rows in use are always the
      first ones; cache.lengths, a list, has their numbers of tokens.
    - By step (hidden(ids, cache=cache)): one token for every row. Tensor shapes are the same at each step, so a CUDA
      graph can replay it. The caller sets cache.positions, a tensor (rows,), and cache.width: keys from this position
      on are not read.
    """

    def __init__(
        self,
        config: Config,
        rows: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, max_len, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = [0] * rows
        self.positions, self.width = torch.zeros(rows, dtype=torch.long, device=device), max_len

    @property
    def rows(self) -> int:
        return self.k.shape[1]

    @property
    def max_len(self) -> int:
        return self.k.shape[3]

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def copy_start(self, row: int, other: "KVCache", other_row: int, n: int) -> None:
        """Fills the first n positions of a row from another cache's row."""
        for to, source in ((self.k, other.k), (self.v, other.v)):
            to[:, row, :, :n] = source[:, other_row, :, :n]
        self.lengths[row] = n

    def remove(self, row: int) -> None:
        """Frees a row. The last row in use moves into its place."""
        n, last = self.lengths.pop(), len(self.lengths)
        if row < last:
            for x in (self.k, self.v):
                x[:, row, :, :n] = x[:, last, :, :n]
            self.lengths[row] = n

    def layer(self, i: int) -> "LayerCache":
        """The part of block i."""
        return LayerCache(self, self.k[i], self.v[i])

    def begin_step(self) -> None:
        """Prepares the tensors that all layers of a step share: row numbers and the mask (rows, 1, 1, width)."""
        device = self.k.device
        self.row_numbers = torch.arange(len(self.positions), device=device)
        unseen = torch.arange(self.width, device=device) > self.positions[:, None, None, None]
        self.mask = torch.zeros(unseen.shape, dtype=self.k.dtype, device=device).masked_fill_(unseen, -torch.inf)


@dataclass(frozen=True)
class LayerCache:
    """One block's part of a KVCache. k, v: (rows, Hkv, max_len, D), views into the cache."""

    cache: KVCache
    k: Tensor
    v: Tensor


def cached_attention(q: Tensor, k: Tensor, v: Tensor, layer: LayerCache, lengths: list[int] | None = None) -> Tensor:
    """Adds k and v to the block's cache, then attends to each row's keys up to the query's position.

    q: (1, T, Hq, D); k, v: (1, T, Hkv, D), packed with lengths -> (1, T, Hq, D). Without lengths one token for every
    row: (rows, 1, H, D).
    """
    if lengths is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (rows, H, 1, D)
        return attend_step(q, k, v, layer).transpose(1, 2)
    starts = layer.cache.lengths[: len(lengths)]
    rows, positions = cache_places(tuple(starts), tuple(lengths), k.device)
    layer.k[rows, :, positions], layer.v[rows, :, positions] = k[0], v[0]  # (T, Hkv, D)
    if has_varlen_kernel(q) and fused():
        return attend_packed_at_once(q[0], layer, starts, lengths)[None]
    return attend_packed(q.transpose(1, 2), layer, starts, lengths).transpose(1, 2)


@functools.lru_cache(maxsize=4)  # all layers of a forward use the same tensors
def cache_places(starts: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and the position in the cache of each token of a packed row: (T,), (T,).

    Document i adds lengths[i] tokens to row i, from position starts[i] on.
    """
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths), output_size=sum(lengths))
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths)])
    return to_device(rows, device), to_device(positions, device)


def attend_packed_at_once(q: Tensor, layer: LayerCache, starts: list[int], lengths: list[int]) -> Tensor:
    """attend_packed with torch's variable-length kernel, on a copy of the keys and values. q: (T, Hq, D) -> the same."""
    ends = [start + n for start, n in zip(starts, lengths)]
    rows, positions = cache_places((0,) * len(ends), tuple(ends), q.device)
    k, v = (x[rows, :, positions] for x in (layer.k, layer.v))  # (sum(ends), Hkv, D)
    return varlen_attention(q, k, v, lengths, ends)


def attend_packed(q: Tensor, layer: LayerCache, starts: list[int], lengths: list[int]) -> Tensor:
    """Attends from each document's new tokens to its row of the cache, one row at a time. q: (1, Hq, T, D) -> the same.

    Fused: the leading rows that add one token each share few calls. generate() puts decoding rows before new prompts.
    """
    singles = next((i for i, n in enumerate(lengths) if n != 1), len(lengths))
    batched = singles if fused() else 0
    parts = attend_single_tokens(q[0, :, :batched], layer, starts[:batched])
    for row, q_i in enumerate(q[:, :, batched:].split(lengths[batched:], 2), batched):
        if lengths[row]:
            end = starts[row] + lengths[row]
            parts.append(attend(q_i, layer.k[row : row + 1, :, :end], layer.v[row : row + 1, :, :end]))
    return torch.cat(parts, dim=2)


def attend_single_tokens(q: Tensor, layer: LayerCache, starts: list[int]) -> list[Tensor]:
    """A decoding step: the new token of row i, at position starts[i], sees keys 0 .. starts[i] of the row.

    q: (Hq, n, D) -> one tensor (1, Hq, rows of the call, D) per call. On a CPU, a call reads every row up to the length
    of its longest one, so a call takes 4 rows. On a GPU, one call takes all rows.
    """
    (Hq, n, D), Hkv, parts = q.shape, layer.k.shape[1], []
    size = n if q.is_cuda else 4
    for first in range(0, n, size or 1):
        rows = slice(first, min(first + size, n))
        mask = visible_keys(tuple(starts[rows]), q.device)  # (n, 1, 1, Tk)
        k, v = (x[rows, :, : mask.shape[-1]] for x in (layer.k, layer.v))  # (n, Hkv, Tk, D)
        grouped = group_queries(q[:, rows].transpose(0, 1), Hkv)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        parts.append(out.reshape(len(mask), Hq, D).transpose(0, 1)[None])
    return parts


def group_queries(q: Tensor, Hkv: int) -> Tensor:
    """(n, Hq, D) -> (n, Hkv, Hq / Hkv, D): the query heads of a group become queries of their key-value head.

    With one token per row, this gives grouped-query attention without repeating the cached keys and values.
    """
    n, Hq, D = q.shape
    return q.reshape(n, Hkv, Hq // Hkv, D)


@functools.lru_cache(maxsize=64)  # all layers of a forward use the same tensor
def visible_keys(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """True where the new token of row i, at position starts[i], sees a key: (n, 1, 1, max(starts) + 1)."""
    last = to_device(torch.tensor(starts), device)  # (n,)
    return torch.arange(max(starts) + 1, device=device) <= last[:, None, None, None]


def attend_step(q: Tensor, k: Tensor, v: Tensor, layer: LayerCache) -> Tensor:
    """One token for every row, at cache.positions. Shapes never change and no tensor value is read by Python.

    q: (rows, Hq, 1, D); k, v: (rows, Hkv, 1, D) -> (rows, Hq, 1, D). Call cache.begin_step() before the first layer.
    """
    cache = layer.cache
    at = cache.row_numbers, slice(None), cache.positions
    layer.k[at], layer.v[at] = k[:, :, 0], v[:, :, 0]  # (rows, Hkv, D)
    k, v = (x[:, :, : cache.width] for x in (layer.k, layer.v))  # (rows, Hkv, width, D)
    grouped = group_queries(q[:, :, 0], k.shape[1])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=cache.mask).reshape(q.shape)
