"""The memory of a training step, counted from the model's shape.

    python memory.py                  # Qwen2 of three sizes, on one and on eight GPUs, as a Markdown table
    python memory.py --ckpt C         # the same of a checkpoint
"""

import contextlib
import os

import torch

from checkpoint import Checkpoint, cli, parse_config
from flags import Parser, at_least, number
from layers import head_columns

GIB = 2**30


def parameters(c):
    """Elements of a Config's model: (one block, embedding and head, all)."""
    C, A, K = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = 2 * C * A + 2 * C * K + 3 * C * c.intermediate_size + A + 2 * K + 2 * C  # matrices, biases, norms
    vocabulary = c.vocab_size * C * (1 if c.tie_word_embeddings else 2)
    return block, vocabulary, c.num_hidden_layers * block + vocabulary + C


def forward_flops(config, lengths, outputs):
    """FLOPs of one forward over documents of these lengths, with logits at `outputs` positions.

    A matrix takes 2 per weight and token, causal attention 2 matmuls of 2 D per pair of query and key and head, of
    which a document of T tokens has T (T + 1) / 2. The last block's own output is needed at `outputs` positions alone.
    Norms, activations and softmax are not counted."""
    c = config
    before = c.hidden_size * c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads)  # attention
    after = c.hidden_size * (c.head_dim * c.num_attention_heads + 3 * c.intermediate_size)
    matrices = before + (c.num_hidden_layers - 1) * (before + after)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    scores = c.num_hidden_layers * c.num_attention_heads * 4 * c.head_dim * pairs
    return 2 * matrices * sum(lengths) + scores + 2 * (after + c.vocab_size * c.hidden_size) * outputs


def memory_needed(c, tokens, checkpointing, item, shards=1, kind="cpu", compiled=False):
    """Bytes at the peak of a training step on one device: {"state", "activations", "work"}, whose sum is the peak.

    c: Config. tokens: of the largest micro-batch, all supervised. item: bytes of a number of the compute dtype.
    shards: the ranks that --shard spreads the model over. With C the hidden size, A and K the widths of the queries and of
    the keys, I that of the MLP, H query heads, L blocks, V rows of the head:

    state        weight, gradient and two moments in fp32: 16 bytes per parameter, over the shards.
    activations  what the backward needs. A block keeps 2C + 3A + 2K + 2I numbers per token: its input, the queries, keys and
                 values (K is A where attend_documents repeats them), what attention gives as it comes and as o_proj
                 takes it, the sum of input and attention, gate and up; in fp32 one per norm and query head; below
                 fp32 o_proj's matrix in that dtype (not if sharded: that is gathered again). A compiled block also keeps both
                 norms' outputs, what down_proj takes, and below fp32 all its matrices in that dtype. Around the blocks: 2C of
                 the last norm, C of the states that the head takes, the rotary angles. With checkpointing a block keeps
                 its input alone, C numbers per token.
    work         what is there for a while. With the head: a tile of logits (see head_columns) and its softmax, the head's own
                 gradient, that of the states, below fp32 also the tile of the head in that dtype. Or with a block's backward:
                 four tensors of the MLP's width, one of its matrices' gradients, the head's if that is the embedding too; with
                 checkpointing also all that the block keeps. Sharded: embedding and head, whole, and two blocks with their
                 gradients.
    Gradients are counted although those of the first micro-batch do not stand beside its activations yet.
    """
    C, A, K = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    H, I, L, V = c.num_attention_heads, c.intermediate_size, c.num_hidden_layers, c.vocab_size
    block, vocabulary, total = parameters(c)
    low = item if item < 4 else 0  # bytes of a copy in the compute dtype, where one is made

    kept = tokens * (item * (2 * C + 3 * A + 2 * K + 2 * I) + 4 * (H + 2)) + (low * C * A if shards == 1 else 0)
    if compiled:
        kept += tokens * item * (2 * C + I) + (low * block if shards == 1 else 0)
    around = tokens * (item * (3 * C + 2 * c.head_dim) + 48)  # 48: ids, positions, targets, owners as int64, fp32 sums
    activations = around + L * (tokens * item * C if checkpointing else kept)

    words = min(V, head_columns(kind))
    head = tokens * words * 8 + 4 * V * C + words * C * 2 * low + tokens * C * (4 + low)
    mlp = tokens * item * (4 * I + 2 * C) + C * I * (4 + 2 * low) + (4 * V * C if c.tie_word_embeddings else 0)
    mlp += kept if checkpointing else 0
    work = max(head, mlp) + (4 * vocabulary + 2 * block * (2 * item + 4) if shards > 1 else 0)
    return {"state": 16 * total // shards, "activations": activations, "work": work}


def available_memory():
    """Bytes that a process may take without swapping, within the machine and its container; 0 where the system (any but Linux)
    does not say."""
    try:
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no container, or "max": no limit
        most, used = (int(open(f"/sys/fs/cgroup/memory.{name}").read()) for name in ("max", "current"))
        with open("/sys/fs/cgroup/memory.stat") as f:  # pages of files that nobody reads now count as used and make room when asked
            used -= next(int(line.split()[1]) for line in f if line.startswith("inactive_file "))
        free = min(free, max(1, most - used))  # 1: known to be nothing
    return free


def free_memory(device):
    """Bytes that this process may still take on the device; 0 where nothing says how many."""
    kind = torch.device(device).type
    if kind == "cuda":  # what torch holds back from former tensors is free too
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if kind == "cpu" else 0


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


def table(configs, tokens, rate, examples, length, supervised):
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
    p.add_argument("--peak", type=number(above=0), default=989, help="TFLOP/s of a GPU; default: an H100 or H200 with dense bf16")
    p.add_argument("--share", type=number(above=0), default=0.4, help="assumed fraction of the peak that is reached")
    a = p.parse_args()
    configs = {ckpt: parse_config(Checkpoint(ckpt).config) for ckpt in a.ckpt} or {name: shape(*s) for name, s in SHAPES.items()}
    print(table(configs, a.micro_tokens, a.peak * a.share * 1e12, a.examples, a.length, a.supervised))
    print(
        f"\nComputed, not measured: memory as memory.py counts it, at {a.micro_tokens:,} micro-tokens, bf16 over fp32 weights; "
        f"time of an epoch of {a.examples:,} examples of {a.length} tokens, {a.supervised} supervised, at {a.share:.0%} of {a.peak:,.0f} "
        "TFLOP/s a GPU, without / with checkpointing, KTO's reference pass included, communication not."
    )


if __name__ == "__main__":
    cli(main)
