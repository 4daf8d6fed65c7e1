"""Chooses the next token from logits."""

import torch
from torch import Tensor


def sample(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Samples one token per row by inverse transform. logits: (B, V) fp32, uniform: (B,) in [0, 1) -> (B,).

    temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens (0: all). top_p then keeps the fewest of
    these that together reach probability p (nucleus sampling, arXiv 1904.09751). transformers uses the same order.
    """
    if temperature < 1e-6:  # 0, or so small that the division may overflow
        return logits.argmax(-1)
    logits, order = logits / temperature, None
    if top_k:
        logits, order = logits.topk(min(top_k, logits.shape[1]), dim=-1)  # (B, k), from large to small
    elif top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    p = logits.softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # drop a token if the likelier ones reach top_p
    cumulative = p.double().cumsum(-1)
    pick = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)
    pick = pick.clamp_max(p.shape[1] - 1)  # (B, 1)
    return (pick if order is None else order.gather(1, pick))[:, 0]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The repetition penalty of arXiv 1909.05858, in place: lowers the logits (B, V) of the tokens seen (B, T).

    A token that was seen several times is lowered once.
    """
    old = logits.gather(1, seen)
    return logits.scatter_(1, seen, torch.where(old < 0, old * penalty, old / penalty))
