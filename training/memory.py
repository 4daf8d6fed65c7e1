"""How much memory and how many FLOPs a training step takes."""

from core.layers import head_columns


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
