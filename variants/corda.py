"""CorDA (arXiv 2406.05223): LoRA from the directions of each weight that matter least or most for given inputs.

    python -m variants.corda --mode keep --calibration questions.jsonl --ckpt base --data chats.jsonl --out corda
    python -m variants.corda --mode learn --ckpt base --data chats.jsonl --out corda

--mode keep trains the directions that matter least for the --calibration inputs, so that the model still knows them.
--mode learn trains those that matter most for the task. All flags of train_sft.py work except --shard. OUT is an
ordinary checkpoint. The biases stay frozen; the authors train them.
"""

import argparse
import math
import random

import torch
from torch import Tensor, nn
from tqdm import tqdm

import train_sft
from core.conversations import sft_conversations
from core.devices import to_device
from core.distributed import is_main, run_distributed
from core.files import InputError, cli
from core.flags import at_least
from core.records import read_records
from model import Qwen2
from training.examples import encode_chats
from training.setup import Setup
from variants.lora import add_adapters, fold, linear_layers

COVARIANCES = 2**28  # covariance entries in memory at once, 1 GiB


def corda_split(weight: Tensor, covariance: Tensor, rank: int, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """CorDA's initialisation of a layer -> (W_res (O, C), A (r, C), B (O, r)), with W = W_res + B A.

        U S V^T = svd(W K')        B = U_r sqrt(S_r)        A = sqrt(S_r) V_r^T K'^-1
        K' = K + damp mean(diag K) I        damp = 0.01, doubled until ||K' K'^-1 - I|| < 0.05

    weight: W (O, C). covariance: K (C, C) of the layer's inputs. U_r, S_r, V_r: the r components with the largest
    singular values, or those with the smallest.
    """
    identity, damp = torch.eye(len(covariance), device=weight.device), 0.01 * covariance.diagonal().mean()
    if not 0 < damp < math.inf:
        raise InputError("CorDA: the inputs of a layer are all 0 or not finite")
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


@torch.no_grad()
def input_covariances(model: Qwen2, linears: list[nn.Linear], sequences: list[list[int]]) -> list[Tensor]:
    """K = (1/n) sum X^T X of each layer's inputs X (T, C) in n sequences, each X divided by its largest magnitude."""
    found = {linear: linear.weight.new_zeros(linear.in_features, linear.in_features) for linear in linears}

    def add(linear, inputs):
        x = inputs[0].float().flatten(0, -2)  # (T, C)
        x = x / x.abs().max()
        found[linear].addmm_(x.T, x, alpha=1 / len(sequences))

    hooks = [linear.register_forward_pre_hook(add) for linear in linears]
    with torch.compiler.set_stance("force_eager"):  # compiled blocks do not look for new hooks
        for ids in sequences:
            model.hidden(to_device([ids], model.device))
    for hook in hooks:
        hook.remove()
    return list(found.values())


@torch.no_grad()
def add_corda_adapters(setup: Setup) -> None:
    """Adds LoRAs that start from corda_split, with covariances from at most 256 random examples.

    Takes as many blocks at a time as have covariances that fit in memory.
    """
    args, model, examples = setup.args, setup.model, setup.examples
    if args.calibration:
        examples, *_ = encode_chats(read_records(args.calibration, sft_conversations), setup.tokenizer, args.max_len)
    chosen = random.Random(f"{args.seed} calibration").sample(examples, min(len(examples), 256))
    sequences, blocks, c = [ids for ids, _ in chosen], model.model["layers"], model.config
    if args.rank > (most := min(min(linear.weight.shape) for *_, linear in linear_layers(blocks[:1]))):
        raise InputError(f"--rank {args.rank}: the smallest layer has rank {most}; give at most that")
    args.alpha = args.rank  # the authors do not scale by alpha / r
    add_adapters(setup)
    step = max(1, COVARIANCES // (6 * c.hidden_size**2 + c.intermediate_size**2))
    for start in range(0, len(blocks), step):
        adapters = [adapter for *_, adapter in linear_layers(blocks[start : start + step])]
        covariances = input_covariances(model, [adapter.linear for adapter in adapters], sequences)
        bar = tqdm(adapters, "corda", unit="layer", disable=None if is_main() else True)
        for adapter, covariance in zip(bar, covariances):
            weight, learn = adapter.linear.weight, args.mode == "learn"
            weight[:], adapter.A[:], adapter.B[:] = corda_split(weight, covariance, args.rank, learn)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="corda.pt", method="LoRA initialised by CorDA (arXiv 2406.05223)", lr=2e-5)
    ways = "keep: train the directions that matter least for the inputs of --calibration; learn: those that matter most"
    parser.add_argument("--mode", choices=["keep", "learn"], required=True, help=ways)
    parser.add_argument("--calibration", nargs="+", help="data files; default for --mode learn: --data")
    parser.add_argument("--rank", type=at_least(1), default=128, help="r, directions to train in each layer")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags, no_shard="adapters cannot be added to a sharded model")
    if args.mode == "keep" and not args.calibration:
        raise InputError("--mode keep: needs --calibration, data that the model must still answer, such as questions")
    train_sft.main(args, prepare=add_corda_adapters, before_save=fold)


if __name__ == "__main__":
    cli(run_distributed(main))
