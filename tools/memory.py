"""The memory of a training step, counted from the model's shape.

python -m tools.memory                  # Qwen2 of three sizes, on one and on eight GPUs, as a Markdown table
python -m tools.memory --ckpt C         # the same of a checkpoint
"""

from core.checkpoint import Checkpoint
from core.config import parse_config
from core.files import cli
from core.flags import Parser, at_least, number
from core.pages import GIB
from training.memory import forward_flops, memory_needed

# ---------------------------------------------------------------------------------------------------------------------
# The table

SHAPES = {  # of Qwen2's config.json: hidden and intermediate size, blocks, query and key heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}


def raw_config(*numbers):
    """A config.json of that shape, as a dict."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size tie_word_embeddings"
    return {"model_type": "qwen2"} | dict(zip(names.split(), numbers, strict=True))


def shape(*numbers):
    return parse_config(raw_config(*numbers))


def memory_table(configs, tokens, rate, examples, length, supervised):
    """Markdown: GiB a GPU at that many micro-tokens, bf16 over fp32; minutes or hours of one epoch at `rate` FLOP/s a GPU.

    configs: {name: Config}. examples, length, supervised: how many, and the tokens of each. Recomputing costs a forward.
    """
    lines = ["| model | GPUs | GiB a GPU | with checkpointing | SFT | KTO |", "|---|---|---|---|---|---|"]
    for name, c in configs.items():
        forward = examples * forward_flops(c, [length], supervised)
        for gpus, shards, how in (1, 1, "1"), (8, 1, "8, replicated"), (8, 8, "8, `--shard`"):
            whole, less = (sum(memory_needed(c, tokens, on, 2, shards, "cuda").values()) / GIB for on in (False, True))
            times = []
            for forwards in 3, 6:  # forward and backward; KTO also the mismatched pairs and the reference of both
                times.append(" / ".join(minutes(n * forward / gpus / rate) for n in (forwards, forwards + 1)))
            lines.append(f"| {name} | {how} | {whole:.0f} | {less:.0f} | {times[0]} | {times[1]} |")
    return "\n".join(lines)


def minutes(seconds):
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main():
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", nargs="+", default=[], help="checkpoints instead of the three sizes")
    p.add_argument("--micro-tokens", type=at_least(1), default=16384, help="tokens of one forward on one GPU")
    # time
    p.add_argument("--examples", type=at_least(1), default=14000, help="examples of the epoch")
    p.add_argument("--length", type=at_least(1), default=500, help="tokens per example")
    p.add_argument("--supervised", type=at_least(1), default=250, help="supervised tokens among them")
    p.add_argument(
        "--peak", type=number(above=0), default=989, help="TFLOP/s of a GPU; default: an H100 or H200 with dense bf16"
    )
    p.add_argument("--share", type=number(above=0), default=0.4, help="assumed fraction of the peak that is reached")
    a = p.parse_args()
    configs = {ckpt: parse_config(Checkpoint(ckpt).config) for ckpt in a.ckpt} or {
        name: shape(*s) for name, s in SHAPES.items()
    }
    print(memory_table(configs, a.micro_tokens, a.peak * a.share * 1e12, a.examples, a.length, a.supervised))
    print(
        f"\nComputed, not measured: memory as training/memory.py counts it, at {a.micro_tokens:,} micro-tokens, bf16 over fp32 weights; "
        f"time of an epoch of {a.examples:,} examples of {a.length} tokens, {a.supervised} supervised, at {a.share:.0%} of {a.peak:,.0f} "
        "TFLOP/s a GPU, without / with checkpointing, KTO's reference pass included, communication not."
    )


if __name__ == "__main__":
    cli(main)
