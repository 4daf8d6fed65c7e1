"""Qwen2's layers. Weights keep their dtype (fp32 in training); computation is in the dtype of the activations.

Each fused operation comes with its plain version, which gives the same numbers but takes more time or memory.
KERNELS=plain in the environment selects the plain versions everywhere.
"""

import os
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import core.mkl  # noqa: F401  (the first parallel cosine would otherwise be inexact at times)
from core.files import InputError

KERNELS = os.environ.get("KERNELS", "fused")


def fused() -> bool:
    """True if the fused operations are on. InputError if KERNELS is neither "fused" nor "plain"."""
    if KERNELS not in ("fused", "plain"):
        raise InputError(f"KERNELS={KERNELS} in the environment: set it to fused or plain, or unset it")
    return KERNELS == "fused"


# ---------------------------------------------------------------------------------------------------------------------
# Linear, Embedding


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C) times the transpose of weight (O, C), plus bias (O,), computed in the dtype of x -> (..., O).

    The cast makes fp32 weights compute in bf16 without autocast.
    """
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def onednn_project(x: Tensor, onednn_weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """project with a weight in oneDNN's own layout (see core/onednn.py)."""
    return torch.ops.mkldnn._linear_pointwise(x, onednn_weight, bias, "none", [], "")


class Linear(nn.Linear):
    onednn_weight = None  # set only while core.onednn.onednn_weights is open

    def forward(self, x: Tensor) -> Tensor:
        if self.onednn_weight is not None and not torch.is_grad_enabled():
            return onednn_project(x, self.onednn_weight, self.bias)
        return project(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    onednn_weight = None  # as in Linear

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # on meta, normal_ would import torch's compiler, which takes a second
            super().reset_parameters()

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: x (..., C) -> (..., V)."""
        if self.onednn_weight is not None and not torch.is_grad_enabled():
            return onednn_project(x, self.onednn_weight)
        return project(x, self.weight)


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm (arXiv 1910.07467)

# private operators of torch; a version without them runs the plain formula
RMS_NORM_KERNELS = all(hasattr(torch.ops.aten, name) for name in ("_fused_rms_norm", "_fused_rms_norm_backward"))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row, in fp32: (..., C) -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()


def apply_rms(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    """x r weight in the dtype of x, with r = inverse_rms(x)."""
    return (x * r).to(x.dtype) * weight.to(x.dtype)


def use_rms_kernel(x: Tensor) -> bool:
    """True if torch's CUDA kernel computes the norm of x. The kernel reads x only once."""
    return x.is_cuda and RMS_NORM_KERNELS and fused()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., C), weight (C,) -> (RMSNorm of x (..., C), inverse_rms(x) (..., 1))."""
    if use_rms_kernel(x):
        return torch.ops.aten._fused_rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    r = inverse_rms(x, eps)
    return apply_rms(x, r, weight), r


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Fused for training: the hand-written backward saves fewer tensors than autograd


def can_fuse(*modules: nn.Module) -> bool:
    """True if a fused function may replace the calls of these modules.

    False for subclasses, other modules and modules with hooks, because these must be called. False without gradients,
    because nothing is saved then. False under torch.compile, because the compiler fuses and recomputes by itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not fused():
        return False
    return all(
        type(module) in (Linear, RMSNorm)
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        for module in modules
    )


def normed_linears(x: Tensor, norm: nn.Module, *linears: nn.Module) -> list[Tensor] | tuple[Tensor, ...]:
    """Applies the norm, then each linear layer to its output: x (..., C) -> one (..., O) for each layer."""
    if can_fuse(norm, *linears):
        weights_and_biases = [p for linear in linears for p in (linear.weight, linear.bias)]
        return NormedLinears.apply(x, norm.weight, norm.eps, *weights_and_biases)
    h = norm(x)
    return [linear(h) for linear in linears]


class NormedLinears(torch.autograd.Function):
    """h = RMSNorm(x), then h W^T + b for each W, b of layers = W, b, W, b, ...; b may be None. x: (..., C).

    Saves x and one number per row. The backward recomputes h and adds up the layers' gradients of h inside the matmuls.
    With n = x r, r = inverse_rms(x), g the gradient of h and w the norm's weight (C,):
    dx = r (g w - n mean(g w n)), dw = sum over rows of g n.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float, *layers: Tensor | None) -> tuple[Tensor, ...]:
        h, r = rms_norm(x, w, eps)
        ctx.save_for_backward(x, r, w, *layers[::2])
        ctx.eps = eps
        return tuple(project(h, weight, bias) for weight, bias in zip(layers[::2], layers[1::2]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, r, w, *weights = ctx.saved_tensors
        kernel = use_rms_kernel(x)
        h = (rms_norm(x, w, ctx.eps)[0] if kernel else apply_rms(x, r, w)).flatten(0, -2)  # (T, C)
        g, d_layers = torch.empty_like(h), []
        for i, (d_y, weight) in enumerate(zip(grads, weights)):
            d_y = d_y.flatten(0, -2)  # (T, O)
            torch.addmm(g, d_y, weight.to(d_y.dtype), beta=min(i, 1), out=g)
            weight_needs_grad, bias_needs_grad = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            d_layers.append(matmul_as(d_y.T, h, weight.dtype) if weight_needs_grad else None)
            d_layers.append(d_y.sum(0, dtype=weight.dtype) if bias_needs_grad else None)
        if kernel:
            d_x, d_w = torch.ops.aten._fused_rms_norm_backward(
                g.view(x.shape), x, w.shape, r, w.to(x.dtype), [True, True]
            )
            return d_x, d_w.to(w.dtype), None, *d_layers
        n, g = (x * r).flatten(0, -2), g.float()  # from here on in fp32
        gn = g * n
        mean = (gn @ w.float()).div_(x.shape[-1])  # (T,)
        d_x = n.mul_(-mean[:, None]).addcmul_(g, w.float()).view(x.shape).mul_(r)
        return d_x.to(x.dtype), gn.sum(0).to(w.dtype), None, *d_layers


def swiglu_linear(gate: Tensor, up: Tensor, linear: nn.Module) -> Tensor:
    """linear(silu(gate) * up), the end of SwiGLU (arXiv 2002.05202). gate, up: (..., I) -> (..., C)."""
    if can_fuse(linear) and linear.bias is None:
        return SwiGLULinear.apply(gate, up, linear.weight)
    return linear(F.silu(gate) * up)


class SwiGLULinear(torch.autograd.Function):
    """(silu(gate) * up) W^T. Saves gate and up; the backward recomputes their product."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return project(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        d_product = g @ weight.to(g.dtype)
        silu = F.silu(gate)
        d_weight = matmul_as(g.flatten(0, -2).T, (silu * up).flatten(0, -2), weight.dtype)
        return torch.ops.aten.silu_backward(d_product * up, gate), silu.mul_(d_product), d_weight


def matmul_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b as `dtype`. On a GPU, a product of bf16 matrices is not rounded to bf16 if dtype is fp32."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The head: log-probabilities and KL without the (N, V) logits


def head_columns(device_type: str) -> int:
    """Vocabulary entries per tile of the head. device_type: "cpu" or "cuda".

    CPU: a tile of 1,000 rows (16 MiB) stays in the cache between passes. GPU: as many as softmax holds in registers.
    """
    return 8192 if device_type == "cuda" else 4096


def vocabulary_tiles(weight: Tensor, dtype: torch.dtype, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (start, weight[start : start + columns] as dtype) for each tile of the head's matrix (V, C)."""
    for start in range(0, len(weight), columns):
        yield start, weight[start : start + columns].to(dtype)


def in_tile(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """targets (N,) -> (their columns in the tile [start, start + size), clamped to it; True where they are in it)."""
    column = targets - start
    return column.clamp(0, size - 1), (column >= 0) & (column < size)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target] in fp32. hidden: (N, C), weight: (V, C), targets: (N,) -> (N,)."""
    if len(targets) == 0:
        return hidden.sum(-1).float()  # (0,), still part of the graph
    if fused():
        return TokenLogProbs.apply(hidden, weight, targets, head_columns(hidden.device.type))
    return project(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


class TokenLogProbs(torch.autograd.Function):
    """token_logps over the vocabulary in tiles of `columns` entries; never holds an (N, V) tensor.

    hidden: (N, C), weight: (V, C) in any dtype, targets: (N,) -> (N,) fp32.
    The softmax over all logits is the softmax within a tile times the tile's share of the total. The backward
    recomputes the logits of each tile: d logp / d logits = onehot(target) - softmax(logits).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, columns: int) -> Tensor:
        target_logits, tops, logs = torch.zeros(len(hidden), device=hidden.device), [], []
        for start, w in vocabulary_tiles(weight, hidden.dtype, columns):
            logits = matmul_as(hidden, w.T, torch.float32)  # (N, columns)
            column, inside = in_tile(targets, start, len(w))
            target_logits = torch.where(inside, logits.gather(1, column[:, None])[:, 0], target_logits)
            tops.append(logits.amax(-1))
            logs.append(log_sum_exp_above_top(logits))
            del logits  # before the next tile's
        tops, logs = torch.stack(tops), torch.stack(logs)  # (tiles, N)
        top = tops.amax(0)
        logs += tops - top
        log = logs.logsumexp(0)  # log-sum-exp relative to `top`; not added to `top`, for precision
        logps = target_logits - top - log
        ctx.save_for_backward(hidden, weight, targets, (logs - log).exp(), logps)
        ctx.columns = columns
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, shares, logps = ctx.saved_tensors
        d_hidden = torch.zeros(hidden.shape, device=hidden.device)  # summed over the tiles in fp32
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_target = (-grad * logps.expm1()).to(hidden.dtype)  # (N,)
        for (start, w), share in zip(vocabulary_tiles(weight, hidden.dtype, ctx.columns), shares):
            p = matmul_as(hidden, w.T, torch.float32).softmax(-1)  # (N, columns)
            d_logits = p if p.dtype == hidden.dtype else torch.empty_like(p, dtype=hidden.dtype)
            torch.mul(p, (-grad * share)[:, None], out=d_logits)  # scales and rounds in one pass
            column, inside = in_tile(targets, start, len(w))
            at_target = torch.where(inside, d_target, d_logits.gather(1, column[:, None])[:, 0])
            d_logits.scatter_(1, column[:, None], at_target[:, None])
            add_tile_gradients(d_logits, hidden, w, d_hidden, None if d_weight is None else d_weight[start:])
            del p, d_logits
        return d_hidden.to(hidden.dtype), d_weight, None, None


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
        d_w.copy_(matmul_as(d_logits.T, hidden, d_w.dtype))
