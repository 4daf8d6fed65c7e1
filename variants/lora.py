"""LoRA (arXiv 2106.09685): trains two low-rank matrices for each linear layer of the blocks, and folds them at the end.

    python -m variants.lora --rank 8 --alpha 16 --lr 2e-4 --ckpt base --data chats.jsonl --out lora

All flags of train_sft.py work except --shard. OUT is an ordinary checkpoint. Biases, norms and embedding stay frozen.
"""

import argparse
import math

import torch
from torch import Tensor, nn

import train_sft
from core.distributed import run_distributed
from core.files import cli
from core.flags import at_least, number
from core.layers import project
from model import Qwen2
from training.setup import Setup


def lora_weight(weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """The folded weight, (O, C).

    W' = W + (alpha / r) B A        W: (O, C), A: (r, C), B: (O, r)
    """
    return weight + alpha / len(A) * B @ A


class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A x. Only A and B train. B starts at 0, so the model is unchanged at first."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        new = linear.weight.new_zeros
        self.linear, self.alpha = linear.requires_grad_(False), alpha
        self.A, self.B = nn.Parameter(new(rank, linear.in_features)), nn.Parameter(new(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as in the authors' code and in peft

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.alpha / len(self.A) * project(project(x, self.A), self.B)


def linear_layers(blocks: nn.ModuleList) -> list[tuple[nn.Module, str, nn.Module]]:
    """(attention or MLP, the layer's name in it, the layer) for every linear layer of these blocks."""
    parts = [part for block in blocks for part in (block.self_attn, block.mlp)]
    return [(part, name, linear) for part in parts for name, linear in part.named_children()]


def add_adapters(setup: Setup) -> None:
    """Freezes the model and replaces each linear layer of the blocks by a LoRA."""
    setup.model.requires_grad_(False)
    for part, name, linear in linear_layers(setup.model.model["layers"]):
        setattr(part, name, LoRA(linear, setup.args.rank, setup.args.alpha))


@torch.no_grad()
def fold(model: Qwen2) -> None:
    """Puts the linear layers back, with LoRA folded into their weights."""
    for part, name, adapter in linear_layers(model.model["layers"]):
        adapter.linear.weight.copy_(lora_weight(adapter.linear.weight, adapter.A, adapter.B, adapter.alpha))
        setattr(part, name, adapter.linear)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="lora.pt", method="LoRA (arXiv 2106.09685)", lr=2e-4)
    parser.add_argument("--rank", type=at_least(1), default=8, help="r, the rank: rows of A")
    parser.add_argument("--alpha", type=number(above=0), default=16.0, help="the adapters are scaled by alpha / r")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags, no_shard="adapters cannot be added to a sharded model")
    train_sft.main(args, prepare=add_adapters, before_save=fold)


if __name__ == "__main__":
    cli(run_distributed(main))
