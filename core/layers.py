"""Qwen2's layers. Weights keep their dtype (fp32 in training); computation is in the dtype of the activations.

Each fused operation comes with its plain version, which differs only by rounding but takes more time or memory.
KERNELS=plain in the environment selects the plain versions everywhere.
"""

import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import core.mkl  # noqa: F401  (without it, the first parallel cosine is sometimes inexact)
from core.files import InputError

KERNELS = os.environ.get("KERNELS", "fused")

# In bf16 on a CPU, oneDNN and torch keep a kernel for each shape of a matmul, up to 1,024. Every micro-batch has another
# number of tokens, so the memory of a 0.5B run grew by 0.5 GB a step (docs/LOG.md). A micro-batch needs about 30 kernels.
for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(variable, "64")  # both are read at the first matmul


def fused() -> bool:
    """True if the fused operations are on. InputError if KERNELS is neither "fused" nor "plain"."""
    if KERNELS not in ("fused", "plain"):
        raise InputError(f"KERNELS={KERNELS} in the environment: set it to fused or plain, or unset it")
    return KERNELS == "fused"


# ---------------------------------------------------------------------------------------------------------------------
# Linear, Embedding


def cached_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in dtype if core.casts.cast_once has cast it, else the weight as it is.

    The cast is outside autograd's graph, so it is used only in hand-written autograd functions and without gradients.
    """
    copy = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else getattr(weight, "cast_copy", None)
    return weight if copy is None or copy.dtype != dtype else copy


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C) times the transpose of weight (O, C), plus bias (O,), computed in the dtype of x -> (..., O).

    The cast makes fp32 weights compute in bf16 without autocast.
    """
    return F.linear(x, cached_cast(weight, x.dtype).to(x.dtype), None if bias is None else bias.to(x.dtype))


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

    def forward(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """ids (...) -> (..., C). sparse: the gradient is a sparse tensor, without a row for each vocabulary entry."""
        return F.embedding(ids, self.weight, sparse=sparse)

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
# Fused for training: the hand-written backward saves fewer tensors than autograd. A KTO step on a CPU takes 8 % less
# time and 24 % less memory (docs/LOG.md, 2026-11-22).


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
            torch.addmm(g, d_y, cached_cast(weight, d_y.dtype).to(d_y.dtype), beta=min(i, 1), out=g)
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
        d_product = g @ cached_cast(weight, g.dtype).to(g.dtype)
        silu = F.silu(gate)
        d_weight = matmul_as(g.flatten(0, -2).T, (silu * up).flatten(0, -2), weight.dtype)
        return torch.ops.aten.silu_backward(d_product * up, gate), silu.mul_(d_product), d_weight


def matmul_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b as `dtype`. On a GPU, a product of bf16 matrices is not rounded to bf16 if dtype is fp32."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    if a.is_cpu and a.dtype == torch.bfloat16:
        a = a.contiguous()  # oneDNN multiplies a transposed bf16 matrix at half the speed
    return (a @ b).to(dtype)
