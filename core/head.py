"""The head: log-probabilities and KL divergences of tokens, without the (N, V) logits in memory.

As in core/layers.py, each fused operation comes with its plain version (KERNELS=plain). For 700 positions of a 0.5B,
tiles of the vocabulary take 25 % less time than chunks of positions, and 11 MiB instead of 128 (docs/LOG.md).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.files import InputError
from core.layers import cached_cast, fused, matmul_as, project


def head_columns(device_type: str) -> int:
    """Vocabulary entries per tile of the head. device_type: "cpu" or "cuda".

    CPU: a tile of 1,000 rows (16 MiB) stays in the cache between passes. GPU: as many as softmax holds in registers.
    """
    return 8192 if device_type == "cuda" else 4096


def vocabulary_tiles(weight: Tensor, dtype: torch.dtype, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (start, weight[start : start + columns] as dtype) for each tile of the head's matrix (V, C)."""
    weight = cached_cast(weight, dtype)
    for start in range(0, len(weight), columns):
        yield start, weight[start : start + columns].to(dtype)


def in_tile(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """targets (N,) -> (their columns in the tile [start, start + size), clamped to it; True where they are in it)."""
    column = targets - start
    return column.clamp(0, size - 1), (column >= 0) & (column < size)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, spare_bytes: int = 0) -> Tensor:
    """log softmax(hidden weight^T)[target] in fp32. hidden: (N, C), weight: (V, C), targets: (N,) -> (N,).

    spare_bytes: memory that may be used to keep the logits for the backward, instead of computing them again.
    """
    if len(targets) == 0:
        return hidden.sum(-1).float()  # (0,), still part of the graph
    if fused():
        itemsize = 4 if hidden.is_cuda else hidden.dtype.itemsize  # of what tile_product returns
        keep = torch.is_grad_enabled() and len(hidden) * len(weight) * itemsize <= spare_bytes
        return TokenLogProbs.apply(hidden, weight, targets, head_columns(hidden.device.type), keep)
    return project(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


class TokenLogProbs(torch.autograd.Function):
    """token_logps over the vocabulary in tiles of `columns` entries.

    hidden: (N, C), weight: (V, C) in any dtype, targets: (N,) -> (N,) fp32.
    The softmax over all logits is the softmax within a tile times the tile's share of the total. The backward
    recomputes the logits of each tile: d logp / d logits = onehot(target) - softmax(logits).
    keep: the forward keeps the logits, (N, V) numbers, so that the backward need not recompute them. Same result.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, columns: int, keep: bool = False) -> Tensor:
        target_logits, tops, logs, kept = torch.zeros(len(hidden), device=hidden.device), [], [], []
        for start, w in vocabulary_tiles(weight, hidden.dtype, columns):
            product = tile_product(hidden, w)
            kept += [product] if keep else []
            logits = product.float()  # (N, columns)
            column, inside = in_tile(targets, start, len(w))
            target_logits = torch.where(inside, logits.gather(1, column[:, None])[:, 0], target_logits)
            tops.append(logits.amax(-1))
            logs.append(log_sum_exp_above_top(logits))
            del product, logits  # before the next tile's
        tops, logs = torch.stack(tops), torch.stack(logs)  # (tiles, N)
        top = tops.amax(0)
        logs += tops - top
        log = logs.logsumexp(0)  # log-sum-exp relative to `top`; not added to `top`, for precision
        logps = target_logits - top - log
        ctx.save_for_backward(hidden, weight, targets, (logs - log).exp(), logps, *kept)
        ctx.columns = columns
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, shares, logps, *kept = ctx.saved_tensors
        d_hidden = torch.zeros(hidden.shape, device=hidden.device)  # summed over the tiles in fp32
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_target = (-grad * logps.expm1()).to(hidden.dtype)  # (N,)
        for i, (start, w) in enumerate(vocabulary_tiles(weight, hidden.dtype, ctx.columns)):
            product, share = kept[i] if kept else tile_product(hidden, w), shares[i]
            p = product.float().softmax(-1)  # (N, columns)
            d_logits = p if p.dtype == hidden.dtype else torch.empty_like(p, dtype=hidden.dtype)
            torch.mul(p, (-grad * share)[:, None], out=d_logits)  # scales and rounds in one pass
            column, inside = in_tile(targets, start, len(w))
            at_target = torch.where(inside, d_target, d_logits.gather(1, column[:, None])[:, 0])
            d_logits.scatter_(1, column[:, None], at_target[:, None])
            add_tile_gradients(d_logits, hidden, w, d_hidden, None if d_weight is None else d_weight[start:])
            del product, p, d_logits
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def tile_product(hidden: Tensor, w: Tensor) -> Tensor:
    """The logits of a tile, hidden w^T, (N, columns): in fp32 on a GPU, in the dtype of hidden on a CPU."""
    return matmul_as(hidden, w.T, torch.float32 if hidden.is_cuda else hidden.dtype)


def token_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, forward: bool = False) -> Tensor:
    """The KL divergence between policy and reference over the whole vocabulary, (N,) in fp32 and in nats.

    hidden: (N, C), weight: (V, C) -> p = softmax(hidden weight^T). ref_hidden: (N, C'), ref_weight: (V, C') -> q.
    Default: KL(p || q) = sum_v p_v (log p_v - log q_v), the KL to the reference of RLHF.
    forward=True: KL(q || p) = sum_v q_v (log q_v - log p_v), the forward KL, as in distillation.
    Gradients reach hidden and weight, never the reference. InputError if the vocabularies differ in size.
    """
    if len(weight) != len(ref_weight):
        raise InputError(
            f"the reference has {len(ref_weight)} vocabulary entries, the model {len(weight)}; a KL needs the same ones"
        )
    if len(hidden) == 0:
        return hidden.sum(-1).float()  # (0,), still part of the graph
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    if fused():
        columns = head_columns(hidden.device.type) // 2  # two models share the memory of one tile of token_logps
        return TokenKL.apply(hidden, weight, ref_hidden, ref_weight, forward, columns)
    log_p = project(hidden, weight).float().log_softmax(-1)  # (N, V)
    log_q = project(ref_hidden, ref_weight).float().log_softmax(-1)
    if forward:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class TokenKL(torch.autograd.Function):
    """token_kl over the vocabulary in tiles of `columns` entries; never holds an (N, V) tensor.

    With z the logits of p and y those of q, KL(p || q) = E_p[z - y] - lse(z) + lse(y), where lse is the log-sum-exp;
    KL(q || p) is the same with the two exchanged. The backward recomputes the logits of each tile:
    d KL(p || q) / dz = p (log p - log q - KL), d KL(q || p) / dz = p - q.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, forward: bool, columns: int
    ) -> Tensor:
        tops, logs, means = [], [], []
        for z, y, _ in logit_tiles(hidden, weight, ref_hidden, ref_weight, columns):
            tops.append(torch.stack((z.amax(-1), y.amax(-1))))  # (2, N)
            logs.append(torch.stack((log_sum_exp_above_top(z), log_sum_exp_above_top(y))))
            z, y = (y, z) if forward else (z, y)
            means.append(y.neg_().add_(z).mul_(z.softmax(-1)).sum(-1))  # E[z - y] within the tile
            del z, y  # before the next tile's
        tops, logs, means = torch.stack(tops), torch.stack(logs), torch.stack(means)  # (tiles, 2, N) twice, (tiles, N)
        top = tops.amax(0)  # (2, N)
        logs += tops - top
        log = logs.logsumexp(0)  # lse(z), lse(y) relative to `top`; not added to `top`, for precision
        mean = (means * (logs - log).exp()[:, int(forward)]).sum(0)
        (top_1, top_2), (log_1, log_2) = (top.flip(0), log.flip(0)) if forward else (top, log)
        kl = (mean - (top_1 - top_2)) - (log_1 - log_2)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, top, log, kl)
        ctx.forward_kl, ctx.columns = forward, columns
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ref_hidden, ref_weight, top, log, kl = ctx.saved_tensors
        d_hidden = torch.zeros(hidden.shape, device=hidden.device)  # summed over the tiles in fp32
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        start = 0
        for z, y, w in logit_tiles(hidden, weight, ref_hidden, ref_weight, ctx.columns):
            log_p, log_q = (x.sub_(top[i][:, None]).sub_(log[i][:, None]) for i, x in enumerate((z, y)))
            if ctx.forward_kl:
                d_logits = log_p.exp_().sub_(log_q.exp_())
            else:
                d_logits = log_q.neg_().add_(log_p).sub_(kl[:, None]).mul_(log_p.exp_())
            d_logits = d_logits.mul_(grad[:, None]).to(hidden.dtype)
            add_tile_gradients(d_logits, hidden, w, d_hidden, None if d_weight is None else d_weight[start:])
            start += len(w)
            del z, y, log_p, log_q, d_logits
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None


def logit_tiles(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, columns: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields per tile: policy logits and reference logits, (N, columns) in fp32, and the tile's rows of `weight`."""
    for start, w in vocabulary_tiles(weight, hidden.dtype, columns):
        ref_w = ref_weight[start : start + columns].to(ref_hidden.dtype)
        yield matmul_as(hidden, w.T, torch.float32), matmul_as(ref_hidden, ref_w.T, torch.float32), w


def log_sum_exp_above_top(logits: Tensor) -> Tensor:
    """logsumexp(logits - max(logits)) of each row, in fewer passes: (N, columns) -> (N,)."""
    return -logits.log_softmax(-1).amax(-1)


def add_tile_gradients(d_logits: Tensor, hidden: Tensor, w: Tensor, d_hidden: Tensor, d_weight: Tensor | None) -> None:
    """Adds a tile's gradient to d_hidden (N, C) and writes the gradient of its weight rows to the start of d_weight.

    d_logits: (N, columns), w: (columns, C), both in the dtype of hidden (N, C).
    """
    d_hidden += matmul_as(d_logits, w, torch.float32)
    if d_weight is None:
        return
    d_w = d_weight[: len(w)]
    if d_w.dtype == hidden.dtype:
        torch.mm(d_logits.T, hidden, out=d_w)
    else:
        d_w.copy_(matmul_as(d_logits.T, hidden, d_w.dtype if d_w.is_cuda else hidden.dtype))
