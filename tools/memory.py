"""Memory and time of training, computed from the model's shape.

    python -m tools.memory                  # Qwen2 of three sizes, on one and on eight GPUs, as a Markdown table
    python -m tools.memory --ckpt C         # the same for a checkpoint

The estimate is for the fused kernels and the scripts' own losses. KERNELS=plain and a loss with token_kl take more.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
from core.checkpoint import Checkpoint
from core.config import Config, parse_config
from core.files import cli
from core.flags import Parser, at_least, number
from core.pages import GIB
from training.memory import forward_flops, memory_needed

# From Qwen2's config.json: hidden size, intermediate size, blocks, query heads, key-value heads, vocabulary, tied
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}


def raw_config(*numbers: int) -> dict:
    """config.json as a dict, from a row of SHAPES."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    names = [*names.split(), "vocab_size", "tie_word_embeddings"]
    return {"model_type": "qwen2"} | dict(zip(names, numbers, strict=True))


def memory_table(
    configs: dict[str, Config], micro_tokens: int, rate: float, examples: int, length: int, supervised: int
) -> str:
    """A Markdown table: GiB per GPU in bf16 over fp32 weights, and the time of one epoch at `rate` FLOP/s per GPU.

    examples: number of them. length, supervised: tokens of each. Activation checkpointing costs one more forward.
    """
    lines = ["| model | GPUs | GiB per GPU | with checkpointing | SFT | KTO |", "|---|---|---|---|---|---|"]
    for name, c in configs.items():
        forward = examples * forward_flops(c, [length], supervised)
        for gpus, shards, how in (1, 1, "1"), (8, 1, "8, replicated"), (8, 8, "8, `--shard`"):
            whole, less = (
                sum(memory_needed(c, micro_tokens, on, 2, shards, "cuda").values()) / GIB for on in (False, True)
            )
            times = []
            for forwards in 3, 6:  # forward and backward; KTO also the mismatched pairs and the reference of both
                times.append(" / ".join(minutes(n * forward / gpus / rate) for n in (forwards, forwards + 1)))
            lines.append(f"| {name} | {how} | {whole:.0f} | {less:.0f} | {times[0]} | {times[1]} |")
    return "\n".join(lines)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--ckpt", nargs="+", default=[], help="checkpoints instead of the three sizes")
    p.add_argument("--micro-tokens", type=at_least(1), default=16384, help="tokens of one forward on one GPU")
    # time
    p.add_argument("--examples", type=at_least(1), default=14000, help="examples per epoch")
    p.add_argument("--length", type=at_least(1), default=500, help="tokens per example")
    p.add_argument("--supervised", type=at_least(1), default=250, help="supervised tokens per example")
    p.add_argument(
        "--peak", type=number(above=0), default=989, help="TFLOP/s of a GPU; default: an H100 or H200 with dense bf16"
    )
    p.add_argument("--share", type=number(above=0), default=0.4, help="assumed fraction of the peak that is reached")
    args = p.parse_args()
    configs = {ckpt: parse_config(Checkpoint(ckpt).config) for ckpt in args.ckpt}
    configs = configs or {name: parse_config(raw_config(*shape)) for name, shape in SHAPES.items()}
    rate = args.peak * args.share * 1e12
    print(memory_table(configs, args.micro_tokens, rate, args.examples, args.length, args.supervised))
    print(
        f"\nComputed, not measured, at {args.micro_tokens:,} micro-tokens, bf16 over fp32 weights. Times are without / with "
        f"activation checkpointing, of an epoch of {args.examples:,} examples of {args.length} tokens, {args.supervised} of "
        f"them supervised, at {args.share:.0%} of {args.peak:,.0f} TFLOP/s per GPU. KTO includes its reference pass. "
        "Not counted: communication, KERNELS=plain, a loss with token_kl."
    )


if __name__ == "__main__":
    cli(main)
