"""LoRA (arXiv 2106.09685): trains two thin matrices beside each linear layer of the blocks, and folds them at the end.

    python -m variants.lora --rank 8 --alpha 16 --lr 2e-4 --ckpt base --data chats.jsonl --out lora
    python -m variants.lora --corda keep --calibration questions.jsonl --rank 128 --lr 2e-5 ...

All flags of train_sft.py work but --shard. OUT is an ordinary checkpoint. --corda starts the adapters as CorDA (arXiv
2406.05223) does: from the directions of each weight that matter least for the inputs of --calibration (keep: what the
model knows about them is preserved) or most (learn). Both freeze the biases; CorDA's authors train them.
"""

import argparse
import functools
import math
import random

import torch
from torch import Tensor, nn
from tqdm import tqdm

import train_sft
from core.attention import to_device
from core.conversations import sft_conversations
from core.distributed import is_main, run_distributed
from core.files import InputError, cli
from core.flags import at_least, number
from core.layers import project
from core.records import read_records
from model import Qwen2
from training.examples import encode_chats
from training.setup import Setup


def lora_weight(weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """The folded weight, (O, C).

    W' = W + (alpha / r) B A        W: (O, C), A: (r, C), B: (O, r)
    """
    return weight + alpha / len(A) * B @ A


def corda_split(weight: Tensor, covariance: Tensor, rank: int, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """CorDA's start of a layer -> (W_res (O, C), A (r, C), B (O, r)), with W = W_res + B A.

        U S V^T = svd(W K')        B = U_r sqrt(S_r)        A = sqrt(S_r) V_r^T K'^-1
        K' = K + damp mean(diag K) I        damp = 0.01, doubled until ||K' K'^-1 - I|| < 0.05

    weight: W (O, C). covariance: K (C, C) of the layer's inputs. U_r, S_r, V_r: the r components with the largest
    singular values, or those with the smallest.
    """
    identity, damp = torch.eye(len(covariance), device=weight.device), 0.01 * covariance.diagonal().mean()
    if not 0 < damp < math.inf:
        raise InputError("--corda: the inputs of a layer are all 0 or not finite")
    error = math.inf
    while error >= 0.05:
        damped = covariance + damp * identity
        inverse = torch.linalg.inv(damped)
        error, damp = torch.linalg.matrix_norm(damped @ inverse - identity), 2 * damp
    U, S, Vh = torch.linalg.svd(weight @ damped, full_matrices=False)  # (O, m), (m,), (m, C), m = min(O, C)
    part = slice(None, rank) if largest else slice(len(S) - rank, None)
    root = S[part].sqrt()
    A, B = root[:, None] * (Vh[part] @ inverse), U[:, part] * root
    return weight - B @ A, A, B


class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A x. Only A and B train. B starts at 0, so the model starts as it was."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        new = linear.weight.new_zeros
        self.linear, self.alpha = linear.requires_grad_(False), alpha
        self.A, self.B = nn.Parameter(new(rank, linear.in_features)), nn.Parameter(new(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as in the authors' code and in peft

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.alpha / len(self.A) * project(project(x, self.A), self.B)


def linear_layers(blocks: nn.ModuleList) -> list[tuple[nn.Module, str, nn.Module]]:
    """(attention or MLP, name in it, linear layer) of every linear layer of these blocks."""
    parts = [part for block in blocks for part in (block.self_attn, block.mlp)]
    return [(part, name, linear) for part in parts for name, linear in part.named_children()]


def add_adapters(setup: Setup) -> None:
    """Freezes the model and puts a LoRA in place of each linear layer of the blocks."""
    args, model = setup.args, setup.model
    model.requires_grad_(False)
    if args.corda:
        add_corda_adapters(setup)
        return
    for part, name, linear in linear_layers(model.model["layers"]):
        setattr(part, name, LoRA(linear, args.rank, args.alpha))


SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
COVARIANCES = 2**28  # numbers of all covariances in memory at once: 1 GiB


@torch.no_grad()
def add_corda_adapters(setup: Setup) -> None:
    """Adds LoRAs that start from corda_split, for as many blocks at a time as their covariances fit in memory."""
    args, model = setup.args, setup.model
    sequences, blocks, c = calibration_sequences(setup), model.model["layers"], model.config
    if args.rank > (most := min(min(linear.weight.shape) for _, _, linear in linear_layers(blocks[:1]))):
        raise InputError(f"--rank {args.rank}: the smallest layer has rank {most}; give at most that")
    step = max(1, COVARIANCES // (3 * c.hidden_size**2 + c.intermediate_size**2))
    for start in range(0, len(blocks), step):
        layers = linear_layers(blocks[start : start + step])
        measured = {(part, name): linear for part, name, linear in layers if name not in SAME_INPUT}
        covariance = dict(zip(measured, input_covariances(model, list(measured.values()), sequences)))
        for part, name, linear in tqdm(layers, "corda", unit="layer", disable=None if is_main() else True):
            adapter, own = LoRA(linear, args.rank, args.rank), covariance[part, SAME_INPUT.get(name, name)]
            parts = corda_split(linear.weight, own, args.rank, args.corda == "learn")
            for mine, value in zip((linear.weight, adapter.A, adapter.B), parts):
                mine.copy_(value)
            setattr(part, name, adapter)
        del covariance


@torch.no_grad()
def input_covariances(model: Qwen2, linears: list[nn.Linear], sequences: list[list[int]]) -> list[Tensor]:
    """K = (1/n) sum X^T X of each layer's inputs X (T, C) in n sequences, each X divided by its largest magnitude."""
    found = [linear.weight.new_zeros(linear.in_features, linear.in_features) for linear in linears]

    def add(linear, inputs, total):
        x = inputs[0].float().flatten(0, -2)  # (T, C)
        x = x / x.abs().max()
        total.addmm_(x.T, x, alpha=1 / len(sequences))

    hooks = [x.register_forward_pre_hook(functools.partial(add, total=total)) for x, total in zip(linears, found)]
    with torch.compiler.set_stance("force_eager"):  # compiled blocks do not look for new hooks
        for ids in sequences:
            model.hidden(to_device([ids], model.device))
    for hook in hooks:
        hook.remove()
    return found


def calibration_sequences(setup: Setup) -> list[list[int]]:
    """The token ids of at most 256 random examples of --calibration, or else of --data."""
    args, examples = setup.args, setup.examples
    if args.calibration:
        examples, *_ = encode_chats(read_records(args.calibration, sft_conversations), setup.tokenizer, args.max_len)
        if not examples:
            raise InputError(f"{', '.join(args.calibration)}: no example has a reply within --max-len {args.max_len}")
    chosen = random.Random(f"{args.seed} calibration").sample(examples, min(len(examples), 256))
    return [ids for ids, _ in chosen]


@torch.no_grad()
def fold(model: Qwen2) -> None:
    """Puts the linear layers back, with the folded weights."""
    for part, name, adapter in linear_layers(model.model["layers"]):
        adapter.linear.weight.copy_(lora_weight(adapter.linear.weight, adapter.A, adapter.B, adapter.alpha))
        setattr(part, name, adapter.linear)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__.split("\n\n")[0]
    parser.set_defaults(out="lora.pt", method="LoRA (arXiv 2106.09685)", lr=2e-4)
    parser.add_argument("--rank", type=at_least(1), default=8, help="r, rows of A")
    parser.add_argument("--alpha", type=number(above=0), default=16.0, help="the adapters are scaled by alpha / r")
    start = "CorDA's start, to keep what the model knows or to learn the task; --alpha then has no effect"
    parser.add_argument("--corda", choices=["keep", "learn"], help=start)
    parser.add_argument("--calibration", nargs="+", help="data files for --corda; learn takes --data without them")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags)
    if args.shard:
        raise InputError("--shard: adapters cannot be added to a sharded model; leave it out")
    if args.calibration and not args.corda:
        raise InputError("--calibration: is for --corda; give that too")
    if args.corda == "keep" and not args.calibration:
        raise InputError("--corda keep: give --calibration, data with what the model is to keep, such as questions")
    if args.corda:
        args.method += " started as in CorDA (arXiv 2406.05223)"
    train_sft.main(args, prepare=add_adapters, before_save=fold)


if __name__ == "__main__":
    cli(run_distributed(main))
