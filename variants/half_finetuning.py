"""HFT, half fine-tuning (arXiv 2404.18466): a random half of the matrices of each kind stays frozen.
With the word kto before the flags it trains with KTO instead of SFT.

    python -m variants.half_finetuning --ckpt base --data chats.jsonl --out half
    python -m variants.half_finetuning kto --round 1 --ckpt half --data feedback.jsonl --out half-kto

All flags of train_sft.py work. With the word kto, those of train_kto.py work instead. Give each later stage of training
another --round. Half of the matrices are 45 to 55 % of the blocks' weights, because k and v are small in grouped-query
attention. The authors' code was not found. The choice of matrices follows two re-implementations.
"""

import argparse
import random
import sys

import train_kto
import train_sft
from core.distributed import run_distributed
from core.files import cli
from core.flags import at_least
from training.setup import Setup

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm"]


def frozen_modules(n_blocks: int, seed: str) -> list[str]:
    """The names of the modules to freeze. Embedding, last norm and head stay trainable.

    Per block: 2 of q, k, v, o; 1 of the 2 norms; of gate, up, down 2 in a random half of the blocks, 1 in the others.
    """
    g, names = random.Random(seed), []
    two = set(g.sample(range(n_blocks), n_blocks // 2))
    for k in range(n_blocks):
        chosen = g.sample(ATTENTION, 2) + g.sample(MLP, 2 if k in two else 1) + g.sample(NORMS, 1)
        names += [f"model.layers.{k}.{name}" for name in chosen]
    return names


def freeze_half(setup: Setup) -> None:
    """Freezes the modules of --seed and --round, biases included."""
    args = setup.args
    names = frozen_modules(setup.model.config.num_hidden_layers, f"{args.seed} {args.round}")
    for name in names:
        setup.model.get_submodule(name).requires_grad_(False)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out=parser.get_default("out") and "half.pt")  # KTO's is named after --ckpt
    parser.set_defaults(method=parser.get_default("method") + " of half the weights (HFT, arXiv 2404.18466)")
    parser.add_argument("--round", type=at_least(0), default=0, help="stage of training; each stage draws another half")


def main() -> None:
    kto = sys.argv[1:2] == ["kto"]
    script = train_kto if kto else train_sft
    script.main(script.parse_args(sys.argv[1 + kto :], add_flags), prepare=freeze_half)


if __name__ == "__main__":
    cli(run_distributed(main))
