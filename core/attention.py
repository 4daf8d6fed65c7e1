"""Causal attention: inside each document of a packed row, and over a KV cache for generation.

Scores and softmax are F.scaled_dot_product_attention's, or on GPUs those of torch's variable-length kernel.
"""

import functools
import inspect

import torch
import torch.nn.functional as F

# From torch 2.11 on, Hopper would try cuDNN first, which plans anew for each new shape; and here nearly every call has a new one.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(q, k, v):
    """Causal attention, the last query at the last key. q: (B, Hq, Tq, D); k, v: (B, Hkv, Tk, D), Tk >= Tq."""
    Tq, Tk = q.shape[2], k.shape[2]
    mask = None
    if 1 < Tq < Tk:  # a continuation of several tokens: query i sees keys 0 .. Tk - Tq + i
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):  # the kernel for these knows no grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=Tq == Tk, enable_gqa=True)


def attend_documents(q, k, v, lengths):
    """Causal attention inside each document of one packed row, sum(lengths) = T. q: (1, T, Hq, D); k, v: (1, T, Hkv, D)."""
    if (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    ):
        return varlen_attention(q[0], k[0], v[0], lengths)[None]
    parts = []
    for part in zip(*(x.split(lengths, 1) for x in (q, k, v))):
        q_i, k_i, v_i = (x.transpose(1, 2) for x in part)  # (1, H, T_i, D)
        # a CPU's backward gives each thread whole key-value heads: where these do not go round, long documents repeat them
        if k.requires_grad and k_i.shape[2] > 256 and k_i.shape[1] % torch.get_num_threads():
            k_i, v_i = (x.repeat_interleave(q_i.shape[1] // x.shape[1], dim=1) for x in (k_i, v_i))
        parts.append(attend(q_i, k_i, v_i).transpose(1, 2))
    return torch.cat(parts, dim=1)


def varlen_attention(q, k, v, lengths):
    """attend_documents in one call of torch's variable-length kernel. q: (T, Hq, D); k, v: (T, Hkv, D).

    Causality is a window that reaches back without end. The kernel groups queries in any version; from torch 2.12 on it asks
    whether that is meant."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    ends, longest = document_ends(tuple(lengths), q.device), max(lengths)
    q, k, v = (x.contiguous() for x in (q, k, v))
    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **options)


@functools.lru_cache(maxsize=4)
def document_ends(lengths, device):
    """(0, l1, l1 + l2, ...) as int32 on the device, once for all layers of a forward."""
    return to_device(F.pad(torch.tensor(lengths), (1, 0)).cumsum(0, dtype=torch.int32), device)


@functools.lru_cache(maxsize=64)  # a CPU asks for every few rows
def on_device(numbers, device):
    """A tuple of integers as a tensor on the device, once for all layers of a forward."""
    return to_device(torch.tensor(numbers, dtype=torch.long), device)


@functools.lru_cache(maxsize=64)
def seen_keys(starts, device):
    """Which keys the new token of each row may look at, itself at starts[i]: (n, 1, 1, max(starts) + 1)."""
    return torch.arange(max(starts) + 1, device=device) <= on_device(starts, device)[:, None, None, None]


def to_device(x, device):
    """A list or tensor on the device. A GPU is not waited for: out of pinned memory the copy joins the queue of its work.

    So the host packs the next micro-batch while the device computes this one. torch.tensor(x, device=...) and an index that
    is a list would wait for all that the device has still to do.
    """
    x = torch.as_tensor(x)
    ahead = x.is_cpu and torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if ahead else x.to(device)


class KVCache:
    """Keys and values of `rows` sequences, each of its own length. Rows in use are always the first `len(lengths)`.

    k, v: (layers, rows, Hkv, max_len, D). lengths: the tokens held by each row in use. positions (rows,) and width: see
    begin_step; whoever decodes by it sets them.
    """

    def __init__(self, config, rows, max_len, dtype=torch.float32, device="cpu"):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, max_len, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = [0] * rows

    def begin_step(self):
        """A step of decoding with one new token in every row, at `positions`, of which the first `width` places are looked at:
        makes what all layers share, the rows' numbers and the mask (rows, 1, 1, width) that is added to the scores."""
        device = self.k.device
        self.rows = torch.arange(len(self.positions), device=device)
        ahead = torch.arange(self.width, device=device) > self.positions[:, None, None, None]
        self.mask = torch.zeros(ahead.shape, dtype=self.k.dtype, device=device).masked_fill_(ahead, -torch.inf)

    @property
    def bytes(self):
        return 2 * self.k.numel() * self.k.element_size()

    def copy_start(self, row, other, other_row, n):
        """Row `row` begins with the first n tokens of another cache's row."""
        for to, of in ((self.k, other.k), (self.v, other.v)):
            to[:, row, :, :n] = of[:, other_row, :, :n]
        self.lengths[row] = n

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
        at = torch.arange(ones, device=k.device), slice(None), on_device(tuple(starts[:ones]), k.device)
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
    # One new token a row, the decoding step: one call for many rows. The query heads of a group stand as so many queries
    # of their key-value head, so the cache is read once and never repeated. A CPU is held up by the memory read, which is
    # that of the call's longest row for all of its rows: it takes 4 rows at a time, a GPU all.
    size = ones if q.is_cuda else 4
    for first in range(0, ones, size or 1):
        rows = slice(first, min(first + size, ones))
        mask = seen_keys(tuple(starts[rows]), q.device)  # (n, 1, 1, T)
        k, v = (x[layer, rows, :, : mask.shape[-1]] for x in (cache.k, cache.v))  # (n, Hkv, T, D)
        grouped = q[0, :, rows].transpose(0, 1).reshape(len(mask), Hkv, Hq // Hkv, D)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        parts.append(out.reshape(len(mask), Hq, D).transpose(0, 1)[None])  # (1, Hq, n, D)
    for row, q_i in enumerate(q[:, :, ones:].split(lengths[ones:], 2), ones):
        if lengths[row]:
            end = starts[row] + lengths[row]
            parts.append(attend(q_i, cache.k[layer, row : row + 1, :, :end], cache.v[layer, row : row + 1, :, :end]))
    return torch.cat(parts, dim=2)


def attend_step(q, k, v, cache, layer):
    """One new token in every row of the cache, in shapes that do not change and by lengths that Python never sees.

    q: (rows, Hq, 1, D); k, v: (rows, Hkv, 1, D) are written at cache.positions -> (rows, Hq, 1, D). See KVCache.begin_step.
    So the step can be a CUDA graph.
    """
    (rows, Hq, _, D), Hkv = q.shape, k.shape[1]
    at = cache.rows, slice(None), cache.positions
    cache.k[layer][at], cache.v[layer][at] = k[:, :, 0], v[:, :, 0]  # (rows, Hkv, D)
    k, v = (x[layer, :, :, : cache.width] for x in (cache.k, cache.v))  # (rows, Hkv, width, D)
    grouped = q.reshape(rows, Hkv, Hq // Hkv, D)  # as in attend_cached
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=cache.mask).reshape(rows, Hq, 1, D)


def attention(q, k, v, lengths, cache, layer):
    """What each query takes from the values it may see. q: (B, T, Hq, D); k, v: (B, T, Hkv, D) -> (B, T, Hq, D)."""
    if cache is None and lengths is not None:
        return attend_documents(q, k, v, lengths)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
    if cache is None:
        y = attend(q, k, v)
    elif lengths is None:
        y = attend_step(q, k, v, cache, layer)
    else:
        starts = cache.lengths[: len(lengths)]
        cache.extend(layer, k, v, starts, lengths)
        y = attend_cached(q, cache, layer, starts, lengths)
    return y.transpose(1, 2)
