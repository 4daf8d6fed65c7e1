"""UDS, utility-diversity sampling (arXiv 2510.16882): trains on the best-scoring candidates of each step.

    python -m variants.uds --batch-size 64 --share 0.125 --ckpt base --data chats.jsonl --out chosen

All flags of train_sft.py work except --shard. --batch-size counts the candidates. Scoring costs one forward pass of all
of them. The utility grows with the length, so it favours long examples. Examples chosen in one step may resemble each
other. The authors choose within micro-batches and project with FFTs. This chooses within the step, so that
--micro-tokens changes nothing, and projects the hidden states with fixed Gaussian matrices.
"""

import argparse
import math

import torch
from torch import Tensor

import train_sft
from core.devices import to_device
from core.distributed import run_distributed, sum_over_ranks
from core.files import cli
from core.flags import at_least, number
from model import Qwen2
from training.logps import hidden_states
from training.setup import Setup

ROWS, COLUMNS = 8, 128  # of a projected example


def utility(logits: Tensor) -> Tensor:
    """u: the nuclear norm of an example's logits (T, V): the sum of their singular values."""
    return torch.linalg.matrix_norm(logits, "nuc")


def diversity(z: Tensor, memory: Tensor) -> Tensor:
    """d_i = (1/M) sum_q ||z_i - q||_2, (B,); 0 if M = 0. z: (B, D). memory: (M, D), q of recently trained examples."""
    distances = torch.cdist(z, memory, compute_mode="donot_use_mm_for_euclid_dist")  # (B, M), exact for near ones
    return distances.sum(1) / max(1, len(memory))


def choose_best(u: Tensor, d: Tensor, alpha: float, k: int) -> list[int]:
    """The k examples with the largest score u + alpha d, in their order. u, d: (B,)."""
    return (u + alpha * d).topk(k).indices.sort().values.tolist()


def head_root(head: Tensor) -> Tensor:
    """S (C, C) with S S^T = W^T W, for W (V, C): hidden W^T and hidden S have the same singular values."""
    values, vectors = torch.linalg.eigh((head.T @ head).nan_to_num(0, 0, 0).double())
    return (vectors * values.clamp(min=0).sqrt()).float()


class Sampler:
    """Scores candidates. The memory is a buffer of the model, so that --resume restores it."""

    def __init__(self, setup: Setup):
        self.args, self.ranks, model = setup.args, setup.ranks, setup.model
        V, T, g = len(model.head_weight), self.args.max_len, torch.Generator().manual_seed(self.args.seed)
        self.right = to_device(torch.randn(V, COLUMNS, generator=g) / math.sqrt(COLUMNS), model.device)
        self.left = to_device(torch.randn(ROWS, T, generator=g) / math.sqrt(ROWS), model.device)
        self.alpha = self.args.alpha * math.sqrt(T * V) / 2  # their projection multiplies distances by sqrt(T V) / 2
        self.sizes = [max(1, round(self.args.share * len(step))) for step in setup.steps]  # examples to choose
        # A ring buffer, one step too long: a step that --resume repeats must not overwrite an entry that it reads.
        memory = torch.zeros(self.args.memory + max(self.sizes), ROWS * COLUMNS, device=model.device)
        model.register_buffer("uds_memory", memory)

    @torch.no_grad()
    def score(self, model: Qwen2, examples: list) -> tuple[Tensor, Tensor]:
        """The utility (B,) and the projection z (B, 1024) of each example, from the logits at all its positions.

        L = H W^T is never computed. z = P L G = P (H (W^T G)), with P = left (8, T) and G = right (V, 128).
        """
        head, out = model.head_weight, torch.zeros(len(examples), 1 + ROWS * COLUMNS, device=model.device)
        root, right = head_root(head), head.T @ self.right  # (C, C), (C, 128)
        sequences = [ids for ids, _ in examples]
        for i, hidden in hidden_states(model, sequences, self.args.micro_tokens, self.ranks):  # (T_i, C)
            out[i, 0] = utility((hidden @ root).nan_to_num(0, 0, 0))  # if the model diverges, its loss is NaN
            out[i, 1:] = (self.left[:, : len(hidden)] @ (hidden @ right)).flatten()
        out = sum_over_ranks(out).nan_to_num(0, 0, 0)
        return out[:, 0], out[:, 1:]

    def choose(self, model: Qwen2, batch: train_sft.StepBatch) -> list[int]:
        """Chooses the examples to train on in this step and stores them in the memory."""
        memory, start, k = model.uds_memory, sum(self.sizes[: batch.step]), self.sizes[batch.step]
        u, z = self.score(model, batch.examples)
        slots = [slot % len(memory) for slot in range(max(0, start - self.args.memory), start + k)]
        recent, new = slots[:-k], slots[-k:]
        chosen = choose_best(u, diversity(z, memory[recent]), self.alpha, k)
        memory[new] = z[chosen]
        return chosen


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="chosen.pt", method="UDS (arXiv 2510.16882)", epochs=1, batch_size=64, max_len=512)
    parser.add_argument("--share", type=number(above=0, high=1), default=0.125, help="share of candidates to train on")
    parser.add_argument("--alpha", type=number(0), default=2.5e-3, help="diversity's weight, as in the authors' code")
    parser.add_argument("--memory", type=at_least(0), default=1024, help="recently chosen examples to compare with")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags, no_shard="a sharded model has its head only inside forward")
    train_sft.main(args, prepare=Sampler, choose=lambda model, batch: batch.prepared.choose(model, batch))


if __name__ == "__main__":
    cli(run_distributed(main))
