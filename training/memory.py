"""Memory and FLOPs of a training step, computed from the shapes of the model.

Names in formulas: C hidden size, A and K widths of queries and keys, I width of the MLP, H query heads, D numbers per
head, L blocks, V vocabulary entries.
"""

from core.config import Config
from core.head import head_columns


def count_parameters(config: Config) -> tuple[int, int, int]:
    """Parameters of (one block, embedding and head, the whole model)."""
    c = config
    C, A, K = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = 2 * C * A + 2 * C * K + 3 * C * c.intermediate_size + A + 2 * K + 2 * C  # matrices, biases, norms
    vocabulary = c.vocab_size * C * (1 if c.tie_word_embeddings else 2)
    return block, vocabulary, c.num_hidden_layers * block + vocabulary + C


def forward_flops(config: Config, lengths: list[int], outputs: int) -> int:
    """FLOPs of one forward over documents of these lengths, with logits at `outputs` positions.

    A matrix takes 2 FLOPs per weight and token. Causal attention takes 2 matmuls of 2 D FLOPs per head and pair of
    query and key. A document of T tokens has T (T + 1) / 2 pairs. The last block computes only `outputs` positions.
    Norms, activations and softmax are not counted.
    """
    c = config
    qkv = c.hidden_size * c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads)
    after_attention = c.hidden_size * (c.head_dim * c.num_attention_heads + 3 * c.intermediate_size)
    matrices = qkv + (c.num_hidden_layers - 1) * (qkv + after_attention)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    attention = c.num_hidden_layers * c.num_attention_heads * 4 * c.head_dim * pairs
    return 2 * matrices * sum(lengths) + attention + 2 * (after_attention + c.vocab_size * c.hidden_size) * outputs


def memory_needed(
    config: Config,
    tokens: int,
    checkpointing: bool,
    itemsize: int,
    shards: int = 1,
    device_type: str = "cpu",
    compiled: bool = False,
    fp32_attention: bool = False,
) -> dict[str, int]:
    """Bytes at the peak of a training step on one device: the sum of {"state", "activations", "work", "gaps"}.

    tokens: tokens of the largest micro-batch, all supervised. itemsize: bytes of a number in the compute dtype. shards:
    number of ranks with --shard. docs/scale.md says what is not counted.

    state: weight, gradient and two moments in fp32, 16 bytes per parameter, divided by the shards. This is an upper
    bound: gradients do not exist yet in the first micro-batch.

    activations: tensors saved for the backward.
    - Per block and token 2C + 3A + 2K + 2I numbers: the block's input; q, k, v (repeated keys and values count as A);
      the output of attention in two layouts; the sum of input and attention; gate and up. Plus one fp32 number per norm
      and per head.
    - With fp32_attention, inputs and output of attention in fp32: documents below fp32 that are short (see
      core.attention.attends_in_fp32).
    - Below fp32 also a cast copy of o_proj's matrix. Not with shards, where it is gathered again.
    - A compiled block also keeps the outputs of both norms, the input of down_proj and, below fp32, its matrices.
    - With activation checkpointing a block keeps its input only: C numbers per token.
    - Around the blocks: 2C for the last norm, C for the head's input, and the rotary angles.

    work: temporary tensors (the larger of two peaks) and the gathered weights.
    - The head: a tile of logits and its softmax, the gradients of head and input; below fp32 also the tile's gradient
      and weights.
    - The backward of a block: four tensors of the MLP's width, the gradient of one of its matrices, a tied head's
      gradient; with activation checkpointing also everything that the block keeps.
    - Sharded: embedding and head, and two blocks with their gradients.

    gaps: free parts of the CPU's heap that are too small for the next tensor; measured, about a tenth of the rest.
    """
    c = config
    C, A, K = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    H, I, L, V = c.num_attention_heads, c.intermediate_size, c.num_hidden_layers, c.vocab_size
    block, vocabulary, total = count_parameters(c)
    cast = itemsize if itemsize < 4 else 0  # bytes of a number in a weight's copy below fp32

    kept = tokens * (itemsize * (2 * C + 3 * A + 2 * K + 2 * I) + 4 * (H + 2)) + (cast * C * A if shards == 1 else 0)
    if fp32_attention:
        kept += tokens * (4 - itemsize) * (2 * A + 2 * K)
    if compiled:
        kept += tokens * itemsize * (2 * C + I) + (cast * block if shards == 1 else 0)
    indices = 48  # bytes per token: ids, positions, targets and owners in int64, sums in fp32
    around = tokens * (itemsize * (3 * C + 2 * c.head_dim) + indices)
    activations = around + L * (tokens * itemsize * C if checkpointing else kept)

    columns = min(V, head_columns(device_type))
    head = tokens * columns * (8 + cast) + 4 * V * C + columns * C * 2 * cast + tokens * C * (4 + cast)
    mlp = tokens * itemsize * (4 * I + 2 * C) + C * I * (4 + 2 * cast) + (4 * V * C if c.tie_word_embeddings else 0)
    mlp += kept if checkpointing else 0
    work = max(head, mlp) + (4 * vocabulary + 2 * block * (2 * itemsize + 4) if shards > 1 else 0)
    parts = {"state": 16 * total // shards, "activations": activations, "work": work}
    return parts | {"gaps": sum(parts.values()) // 10 if device_type == "cpu" else 0}
