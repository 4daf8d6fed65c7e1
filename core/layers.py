"""Qwen2's layers over fp32 weights in any compute dtype, and three backwards written by hand.

NormedLinears, SwiGLULinear and TokenLogProbs give the gradients that autograd would, and keep less for them. A module that
somebody puts in the place of a Linear or an RMSNorm, a LoRA say, or hangs a hook on, is called as modules are.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def project(x, weight, bias=None):
    """x (..., C) times weight^T (O, C), plus bias, in the dtype of x: fp32 master weights compute in bf16 without autocast."""
    packed = getattr(weight, "packed", None)
    if packed is not None and x.dtype == weight.dtype and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # see generate.packed_weights
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # where normal_ would load half of torch's compiler, a second, to fill nothing
            super().reset_parameters()


class Linear(nn.Linear):
    def forward(self, x):
        return project(x, self.weight, self.bias)


def matmul_as(a, b, dtype):
    """The matrices' product in a dtype. On a GPU it leaves a matmul of bf16 as the fp32 that it is summed in."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) of each row, in fp32: (..., C) -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()


def apply_rms(x, r, weight):
    """RMSNorm (arXiv 1910.07467) of x, given r = inverse_rms(x): x r weight, in the dtype of x."""
    return (x * r).to(x.dtype) * weight.to(x.dtype)


def rms_norm(x, weight, eps):
    """-> RMSNorm of x, and inverse_rms(x)."""
    if x.is_cuda:  # whose kernel reads x once
        return torch.ops.aten._fused_rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    r = inverse_rms(x, eps)
    return apply_rms(x, r, weight), r


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)[0]


def can_fuse(*modules):
    """Whether the functions below stand for these modules: Linear or RMSNorm as above, without hooks, and not while
    compiling, as a compiler finds for itself what to fuse and what to make again."""
    if torch.compiler.is_compiling():
        return False
    return all(
        type(m) in (Linear, RMSNorm) and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)
        for m in modules
    )


class NormedLinears(torch.autograd.Function):
    """h = RMSNorm(x), then h W^T + b for each pair of layers = W, b, W, b, ..., where b may be None. x: (..., C).

    Keeps x and one number per row: the backward makes h again, and sums the layers' gradients of h inside the matmuls.
    With n = x r, r = inverse_rms(x), g the gradient of h and w the norm's weight (C,):
    dx = r (g w - n mean(g w n)), dw = sum over rows of g n."""

    @staticmethod
    def forward(ctx, x, w, eps, *layers):
        h, r = rms_norm(x, w, eps)
        ctx.save_for_backward(x, r, w, *layers[::2])
        ctx.eps = eps
        return tuple(project(h, weight, bias) for weight, bias in zip(layers[::2], layers[1::2]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, r, w, *weights = ctx.saved_tensors
        h = (rms_norm(x, w, ctx.eps)[0] if x.is_cuda else apply_rms(x, r, w)).flatten(0, -2)  # (T, C)
        g, d_layers = torch.empty_like(h), []
        for i, (d_y, weight) in enumerate(zip(grads, weights)):
            d_y = d_y.flatten(0, -2)  # (T, O)
            torch.addmm(g, d_y, weight.to(d_y.dtype), beta=min(i, 1), out=g)
            w_wanted, b_wanted = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            d_layers.append(matmul_as(d_y.T, h, weight.dtype) if w_wanted else None)
            d_layers.append(d_y.sum(0, dtype=weight.dtype) if b_wanted else None)
        if x.is_cuda:
            d_x, d_w = torch.ops.aten._fused_rms_norm_backward(
                g.view(x.shape), x, w.shape, r, w.to(x.dtype), [True, True]
            )
            return d_x, d_w.to(w.dtype), None, *d_layers
        n, g = (x * r).flatten(0, -2), g.float()  # the rest in fp32
        gn = g * n
        mean = (gn @ w.float()).div_(x.shape[-1])  # (T,)
        d_x = n.mul_(-mean[:, None]).addcmul_(g, w.float()).view(x.shape).mul_(r)
        return d_x.to(x.dtype), gn.sum(0).to(w.dtype), None, *d_layers


def normed_linears(x, norm, *linears):
    """linear(norm(x)) of each of the linear layers."""
    if not can_fuse(norm, *linears):
        h = norm(x)
        return [linear(h) for linear in linears]
    return NormedLinears.apply(
        x, norm.weight, norm.eps, *(p for linear in linears for p in (linear.weight, linear.bias))
    )


class SwiGLULinear(torch.autograd.Function):
    """(silu(gate) * up) W^T (arXiv 2002.05202); keeps gate and up, and makes their product again in the backward."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return project(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up, weight = ctx.saved_tensors
        d_product = g @ weight.to(g.dtype)
        silu = F.silu(gate)
        d_weight = matmul_as(g.flatten(0, -2).T, (silu * up).flatten(0, -2), weight.dtype)
        return torch.ops.aten.silu_backward(d_product * up, gate), silu.mul_(d_product), d_weight


def swiglu_linear(gate, up, linear):
    """linear(silu(gate) * up)."""
    if not can_fuse(linear) or linear.bias is not None:
        return linear(F.silu(gate) * up)
    return SwiGLULinear.apply(gate, up, linear.weight)


# ---------------------------------------------------------------------------------------------------------------------
# The head


def head_columns(kind):
    """Of how many words the head makes the logits at once. On a CPU few, so that a thousand rows of them (16 MiB) stay in its
    cache between the passes over them; on a GPU as many as its softmax holds in registers. kind: "cpu" or "cuda"."""
    return 8192 if kind == "cuda" else 4096


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h W^T)[target] of each row, over W in tiles of `columns` words: no (N, V) tensor is ever there.

    hidden: (N, C), weight: (V, C) in any dtype, targets: (N,) -> (N,) fp32. The softmax is taken in fp32: each tile's by
    itself, times the tile's share of the whole sum. The backward makes the logits again: each tile has its own part of the
    weight's gradient, and adds to that of the states. d logp / d logits = onehot(target) - softmax(logits).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, columns):
        own, tops, logs = torch.zeros(len(hidden), device=hidden.device), [], []
        for start, w in tiles(weight, hidden.dtype, columns):
            logits = matmul_as(hidden, w.T, torch.float32)  # (N, columns)
            at, inside = in_tile(targets, start, len(w))
            own = torch.where(inside, logits.gather(1, at[:, None])[:, 0], own)
            tops.append(logits.amax(-1))
            logs.append(
                -logits.log_softmax(-1).amax(-1)
            )  # logsumexp(logits - top) of the tile, in fewer passes over it
            del logits  # before the next tile's
        tops, logs = torch.stack(tops), torch.stack(logs)  # (tiles, N)
        top = tops.amax(0)
        logs += tops - top
        log = logs.logsumexp(0)  # that of all words, which with top makes the whole; apart, they keep their digits
        logps = own - top - log
        ctx.save_for_backward(hidden, weight, targets, (logs - log).exp(), logps)
        ctx.columns = columns
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, shares, logps = ctx.saved_tensors
        d_hidden = torch.zeros(hidden.shape, device=hidden.device)  # in fp32, whatever the dtype of what it sums
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_own = (-grad * logps.expm1()).to(hidden.dtype)  # (N,)
        for (start, w), share in zip(tiles(weight, hidden.dtype, ctx.columns), shares):
            p = matmul_as(hidden, w.T, torch.float32).softmax(-1)  # (N, columns)
            d_logits = p if p.dtype == hidden.dtype else torch.empty_like(p, dtype=hidden.dtype)
            torch.mul(p, (-grad * share)[:, None], out=d_logits)  # scales and rounds in one pass
            at, inside = in_tile(targets, start, len(w))
            d_logits.scatter_(
                1, at[:, None], torch.where(inside, d_own, d_logits.gather(1, at[:, None])[:, 0])[:, None]
            )
            d_hidden += matmul_as(d_logits, w, torch.float32)
            if d_weight is not None:
                d_w = d_weight[start : start + len(w)]
                if d_w.dtype == hidden.dtype:
                    torch.mm(d_logits.T, hidden, out=d_w)
                else:
                    d_w.copy_(matmul_as(d_logits.T, hidden, d_w.dtype))
            del p, d_logits
        return d_hidden.to(hidden.dtype), d_weight, None, None


def tiles(weight, dtype, columns):
    """Yields (the first word, the rows of weight (V, C) for it and the next ones, `columns` in all) in a dtype."""
    for start in range(0, len(weight), columns):
        yield start, weight[start : start + columns].to(dtype)


def in_tile(targets, start, size):
    """-> (the targets' places in the tile of `size` words from `start` on, or one of its ends; whether they lie in it)."""
    at = targets - start
    return at.clamp(0, size - 1), (at >= 0) & (at < size)


def token_logps(hidden, weight, targets):
    """The log-probability of each target. hidden: (N, C), weight: (V, C), targets: (N,) -> (N,) fp32."""
    if len(targets) == 0:
        return hidden.sum(-1).float()  # (0,), still part of the graph
    return TokenLogProbs.apply(hidden, weight, targets, head_columns(hidden.device.type))
