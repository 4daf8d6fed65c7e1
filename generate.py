"""Batched generation over model.py: ragged prompts without padding, continuous refill, a shared prefix computed once.

    texts = generate(m, tokenizer, [[{"role": "user", "content": "Hello"}], ...], max_new_tokens=100)
    python generate.py --ckpt C --prompt "Why is the sky blue?"

A row's output does not depend on its neighbours: each has its own cache row, its own positions and its own random numbers.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch

from core.attention import to_device
from core.checkpoint import Checkpoint
from core.conversations import as_messages
from core.files import InputError, cli
from core.flags import DEVICE, DTYPE, DTYPES, Parser, at_least, number, torch_device
from core.layers import Linear, fused
from core.pages import available_memory
from core.tokenizer import Tokenizer
from model import Qwen2

# ---------------------------------------------------------------------------------------------------------------------
# Choosing the next token


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token a row by inverting the cumulative distribution. logits: (B, V) fp32, uniform: (B,) in [0, 1) -> (B,).

    temperature 0 is greedy. top_k keeps the k likeliest tokens (0: all); of these, top_p the fewest whose probability
    reaches p (arXiv 1904.09751). transformers filters in this order too.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits / temperature, None
    if top_k or top_p < 1:  # only a filter needs the vocabulary sorted
        logits, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    if top_k:
        logits, order = logits[:, :top_k], order[:, :top_k]
    p = logits.softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # those before it, all likelier, reach top_p
    cumulative = p.double().cumsum(-1)
    pick = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)
    pick = pick.clamp_max(p.shape[1] - 1)  # (B, 1)
    return (pick if order is None else order.gather(1, pick))[:, 0]


def penalise(logits, seen, penalty):
    """The repetition penalty of arXiv 1909.05858, in place: the logits (B, V) of the tokens seen (B, T), some perhaps more than
    once, move down by the factor."""
    old = logits.gather(1, seen)
    return logits.scatter_(1, seen, torch.where(old < 0, old * penalty, old / penalty))


def next_tokens(logits, uniform, fed, at, seen=None, penalty=1.0, **sampling):
    """The next token of each row, by sample(). logits: (B, V), uniform: (B,), fed: (B,) the rows' last tokens, which stand at
    (B,) -> (B,). seen: for a penalty, the rows' tokens so far, (B or more, T), where these are put down."""
    if seen is not None:
        penalise(logits, seen[: len(fed)].scatter_(1, at[:, None], fed[:, None]), penalty)
    return sample(logits, uniform, **sampling)


def common_prefix(sequences):
    """The length of the prefix that all sequences share, at least one token short of the shortest."""
    first, last = min(sequences), max(sequences)  # in lexicographic order, all others lie between these two
    limit = min(map(len, sequences)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def prefix_lengths(prompts, overhead=64, depth=50):
    """For each prompt (a list of tokens) the length of its prefix that is worth computing once for several prompts.

    In lexicographic order the prompts of a common prefix are an interval; it splits where its neighbours share least, if
    that leaves fewer tokens to compute. A prefix costs `overhead` tokens more than its own, since it is a forward of its
    own. depth bounds the recursion.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    shares = [common_prefix((prompts[a], prompts[b])) for a, b in zip(order, order[1:])]

    def best(i, j, depth):  # order[i:j] -> (tokens to compute, the prefix of each)
        total, shared = sum(len(prompts[k]) for k in order[i:j]), min(shares[i : j - 1], default=0)
        whole = total - (j - i - 1) * shared + overhead
        together = (whole, [shared] * (j - i)) if whole < total else (total, [0] * (j - i))
        if j - i == 1 or not depth:
            return together
        ends = [i, *(k + 1 for k in range(i, j - 1) if shares[k] == shared), j]
        parts = [best(a, b, depth - 1) for a, b in zip(ends, ends[1:])]
        apart = sum(tokens for tokens, _ in parts), [n for _, lengths in parts for n in lengths]
        return min(together, apart, key=lambda way: way[0])

    lengths = best(0, len(prompts), depth)[1]
    return [n for _, n in sorted(zip(order, lengths))]


# ---------------------------------------------------------------------------------------------------------------------
# Weights as a CPU's kernels want them


@contextlib.contextmanager
def onednn_weights(model: Qwen2) -> Iterator[None]:
    """While open, the matrices of the model also exist in the layout that oneDNN's CPU kernels read.

    Linear.forward uses them. F.linear reorders the whole weight at each call, which at the 8 to 64 rows of a decoding
    step takes 0.3 to 1 times as long as the product itself. The copies take as much memory as the weights, so they are
    made only if half of the free memory suffices, and only where oneDNN has kernels for the dtype.
    """
    modules = [module for module in model.modules() if isinstance(module, Linear)]
    if model.config.tie_word_embeddings:
        modules.append(model.model["embed_tokens"])  # whose matrix is also the head's
    size = sum(module.weight.numel() * module.weight.element_size() for module in modules)
    if has_onednn_kernels(model) and 2 * size < available_memory():
        for module in modules:
            module.onednn_weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 64)
    try:
        yield
    finally:
        for module in modules:
            module.onednn_weight = None


def has_onednn_kernels(model: Qwen2) -> bool:
    """True on a CPU whose oneDNN multiplies in the model's dtype, if this torch has the operators (they are private)."""
    dtype, operators = model.head_weight.dtype, torch.ops.mkldnn
    if not fused() or model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    if model.compute_dtype not in (None, dtype):
        return False
    if dtype == torch.bfloat16:
        return hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()
    return dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Several steps before the tokens are read back, for GPUs: to read them after each step would leave the GPU idle meanwhile


def decoding_step(m, cache, tokens, uniform, **choice):
    """A function without arguments that feeds `tokens` (rows,) to all rows of the cache and puts the next ones there.
    choice: further arguments of choose().

    It reads uniform (rows,), advances cache.positions (rows,), and needs no tensor's value on the host, so on a GPU it is
    captured as a CUDA graph, one launch for all its kernels. The tensors are the same in each call.
    """

    def step():
        logits = m.head(m.hidden(tokens[:, None], cache=cache)[:, 0]).float()  # (rows, V)
        tokens.copy_(next_tokens(logits, uniform, tokens, cache.positions, **choice))
        cache.positions.add_(1).clamp_max_(cache.k.shape[3] - 1)  # a row that has ended runs on, and stays inside

    if not tokens.is_cuda:
        return step
    state = [x for x in (tokens, cache.positions, choice.get("seen")) if x is not None]
    before = [x.clone() for x in state]
    with torch.cuda.device(tokens.device):  # streams and graphs are those of the current device
        side = torch.cuda.Stream()  # a capture wants some calls before it, on a stream of their own
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    for to, value in zip(
        state, before
    ):  # what the trial steps wrote to the cache lies ahead, where it is written again
        to.copy_(value)
    return graph.replay


def decode_ahead(m, cache, static, feed, random, **choice):
    """The next tokens of each row in use, a list for each step: what is chosen comes to the host once, at the end.

    static: tokens and uniform of decoding_step, and {cache.width: the step}, filled here. feed: each row's last token.
    random: (steps, rows in use) numbers in [0, 1). choice: further arguments of choose().
    """
    (tokens, uniform, steps), (count, n) = static, random.shape
    cache.width = min(-(-(max(cache.lengths) + count) // 256) * 256, cache.k.shape[3])  # few widths, few graphs
    for to, values in ((cache.positions, cache.lengths), (tokens, feed)):
        to[:n] = torch.tensor(values)
        to[n:] = 0
    if cache.width not in steps:
        steps[cache.width] = decoding_step(m, cache, tokens, uniform, **choice)
    random, chosen = random.to(uniform.device), torch.empty(count, n, dtype=torch.long, device=tokens.device)
    for i in range(count):
        uniform[:n] = random[i]
        steps[cache.width]()
        chosen[i] = tokens[:n]
    cache.lengths = [min(length + count, cache.k.shape[3]) for length in cache.lengths]
    return chosen.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def uniforms(rows, steps, temperature):
    """(steps, rows) random numbers in [0, 1) for sample, each row's from its own generator; zeros for greedy rows."""
    if temperature == 0:
        return torch.zeros(steps, len(rows))
    return torch.stack([torch.rand(steps, generator=row["generator"]) for row in rows], dim=1)


@torch.no_grad()
def generate_steps(
    m, tokenizer, prompts, max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, stop=(),
    seed=0, batch_size=32, cache_gb=4.0, prefill_tokens=4096, look_every=None,
):  # fmt: skip
    """Yields (index, tokens so far, finish_reason or None) for each row after each step.

    prompts: message lists, or texts, each a user's message. finish_reason: "stop" after one of the model's end tokens, which
    is not kept, or once the text holds one of the `stop` strings; "length" after max_new_tokens or at the end of the model's
    positions. seed: an integer, from which each row draws by its index, or one integer for each prompt. batch_size: rows in
    flight, or as many as fit a KV cache of cache_gb GiB.
    prefill_tokens bounds the prompt tokens of one forward; more prompts wait a step. look_every: steps until the tokens
    are looked at, and the places of ended rows filled again; by default 16 on a GPU, 1 elsewhere. It changes no reply.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}, temperature {temperature}; they are at least 1 and at least 0"
        )
    prompts = [tokenizer.prompt_ids(as_messages(p, f"prompt {i}")) for i, p in enumerate(prompts)]
    if not prompts:
        return
    seeds = seed if isinstance(seed, (list, tuple)) else [seed * 1_000_003 + i for i in range(len(prompts))]
    end = m.config.max_position_embeddings
    if (full := next((i for i, p in enumerate(prompts) if len(p) >= end), None)) is not None:
        raise InputError(
            f"prompt {full} takes {len(prompts[full])} tokens; the model ends at {end}, so it has no room for a reply"
        )
    limits = [min(max_new_tokens, end - len(p)) for p in prompts]
    longest = max(len(p) + most for p, most in zip(prompts, limits))
    stop = [stop] if isinstance(stop, str) else list(stop)
    tail = 4 * max(
        map(len, stop), default=0
    )  # tokens that hold a stop string at the end: a character has up to 4 bytes

    device = m.device
    fit = int(cache_gb * 2**30 / m.new_cache(1, longest, "meta").bytes)
    cache = m.new_cache(max(1, min(batch_size, len(prompts), fit)), longest)
    cache.lengths = []  # no row is in use yet
    ahead = look_every or (16 if device.type == "cuda" else 1)
    tokens, uniform = (torch.zeros(cache.k.shape[1], dtype=kind, device=device) for kind in (torch.long, torch.float32))
    static, cache.positions = (tokens, uniform, {}), tokens.clone()
    seen = torch.zeros(len(tokens), longest, dtype=torch.long, device=device) if repetition_penalty != 1.0 else None
    choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seen": seen, "penalty": repetition_penalty}
    shared = prefix_lengths(prompts)
    prefix = [tuple(p[:n]) for p, n in zip(prompts, shared)]
    waiting = sorted(
        range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i])
    )  # rows of like length share the batch
    uses, computed = (
        Counter(prefix),
        {(): None},
    )  # {prefix: its KV cache, from the first prompt that has it to the last}

    rows = []  # in flight, one a row of the cache: {"index", "new": tokens so far, "feed": tokens the model sees next}

    def admit():
        """Gives the cache's free rows to waiting prompts, as far as prefill_tokens go; a longer prompt comes alone."""
        budget = prefill_tokens
        while waiting and len(rows) < cache.k.shape[1]:
            i, n = waiting[0], shared[waiting[0]]
            feed = prompts[i][n:]
            if budget < min(len(feed), prefill_tokens):
                break
            waiting.pop(0)
            budget -= len(feed)
            if prefix[i] not in computed:
                computed[prefix[i]] = known = m.new_cache(1, n)
                m.prefill([prefix[i]], known)
            cache.lengths.append(0)
            if n:
                cache.copy_start(len(rows), computed[prefix[i]], 0, n)
                uses[prefix[i]] -= 1
                if not uses[prefix[i]]:
                    del computed[prefix[i]]
            if seen is not None:
                seen[len(rows)] = prompts[i][0]  # up to the end, which so far holds nothing new
                seen[len(rows), : len(prompts[i])] = to_device(prompts[i], device)
            generator = torch.Generator().manual_seed(seeds[i])  # of this row alone
            rows.append({"index": i, "new": [], "feed": feed, "generator": generator})

    with onednn_weights(m) if len(prompts) > 1 else contextlib.nullcontext():
        while waiting or rows:
            admit()
            lengths, fed = [len(row["feed"]) for row in rows], [t for row in rows for t in row["feed"]]
            if ahead > 1 and max(lengths) == 1:
                count = min(ahead, max(limits[row["index"]] - len(row["new"]) for row in rows))
                chosen = decode_ahead(m, cache, static, fed, uniforms(rows, count, temperature), **choice)
            else:
                # One forward for all rows: the others feed their last token, the new ones, behind them, their prompt.
                ids = to_device([fed], device)  # (1, T)
                last = to_device(lengths, device).cumsum(0) - 1
                logits = m.head(m.hidden(ids, lengths, cache, last)[0]).float()  # (rows, V)
                at, random = to_device(cache.lengths, device) - 1, uniforms(rows, 1, temperature)[0].to(device)
                chosen = [next_tokens(logits, random, ids[0, last], at, **choice).tolist()]

            for r in reversed(range(len(rows))):  # backwards: remove() moves the last row, which has been looked at
                row = rows[r]
                for token in (tokens[r] for tokens in chosen):
                    row["feed"], finish = [token], "stop" if token in tokenizer.stop_ids else None
                    if not finish:
                        row["new"].append(token)
                        if stop and any(text in tokenizer.decode(row["new"][-tail:]) for text in stop):
                            finish = "stop"
                        elif len(row["new"]) == limits[row["index"]]:
                            finish = "length"
                    yield row["index"], row["new"], finish
                    if finish:
                        cache.remove(r)
                        if seen is not None:
                            seen[r] = seen[len(rows) - 1]
                        rows[r] = rows[-1]
                        rows.pop()
                        break


def generate_iter(m, tokenizer, prompts, *args, stop=(), **settings):
    """Yields (index, text, finish_reason) for each prompt as it finishes; the order is not that of the prompts.

    Arguments as in generate_steps. The text ends before the first of the `stop` strings."""
    stop = [stop] if isinstance(stop, str) else list(stop)
    for i, tokens, finish in generate_steps(m, tokenizer, prompts, *args, stop=stop, **settings):
        if finish:
            text = tokenizer.decode(tokens)
            yield i, text[: min((at for s in stop if (at := text.find(s)) >= 0), default=None)], finish


def generate(m, tokenizer, prompts, max_new_tokens=256, temperature=0.0, **settings):
    """prompts: list of message lists or texts -> their replies, a list of texts in the same order. Arguments as in generate_steps.

    Several samples of one prompt: repeat the prompt; what its copies share is computed once."""
    texts = [""] * len(prompts)
    for i, text, _ in generate_iter(m, tokenizer, prompts, max_new_tokens, temperature, **settings):
        texts[i] = text
    return texts


def stream(m, tokenizer, messages, **settings):
    """Yields the pieces of one reply's text as they come; a character whose bytes are not all there waits."""
    told = 0
    for _, tokens, finish in generate_steps(m, tokenizer, [messages], **settings):
        text = tokenizer.decode(tokens)
        if finish or not text.endswith("\ufffd"):
            yield text[told:]
            told = len(text)


def main():
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", required=True, help="hub id, directory or .pt file")
    p.add_argument("--prompt", nargs="+", help="one or several user messages; without it, a chat in the terminal")
    p.add_argument("--system", help="system prompt instead of the template's default")
    # sampling
    p.add_argument("--max-new-tokens", type=at_least(1), default=512, help="most tokens of a reply")
    p.add_argument("--temperature", type=number(0), default=0.0, help="0 is greedy")
    p.add_argument("--top-k", type=at_least(0), default=0, help="keep the k likeliest tokens; 0 keeps all")
    p.add_argument(
        "--top-p", type=number(above=0), default=1.0, help="keep the likeliest tokens that reach this probability"
    )
    p.add_argument(
        "--repetition-penalty",
        type=number(above=0),
        default=1.0,
        help="above 1, tokens already there become less likely; "
        "transformers' generate takes it from the checkpoint's generation_config.json, this does not",
    )
    p.add_argument("--seed", type=int, default=0, help="of the sampling")
    p.add_argument(
        "--cache-gb", type=number(above=0), default=4.0, help="GiB of keys and values: prompts that do not fit wait"
    )
    # machine
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="of weights and computation")
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")
    a = p.parse_args()
    ckpt = Checkpoint(a.ckpt)
    m = Qwen2.from_pretrained(ckpt, dtype=DTYPES[a.dtype], device=a.device)
    tokenizer = Tokenizer(ckpt)
    settings = {
        k: getattr(a, k)
        for k in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "cache_gb")
    }
    system = [{"role": "system", "content": a.system}] if a.system else []
    if a.prompt:
        prompts = [system + [{"role": "user", "content": text}] for text in a.prompt]
        for text, reply in zip(a.prompt, generate(m, tokenizer, prompts, **settings)):
            print(f"> {text}\n{reply}\n")
        return
    messages = list(system)
    print("An empty line ends the chat.")
    with contextlib.suppress(EOFError):
        while text := input("> ").strip():
            messages.append({"role": "user", "content": text})
            reply = ""
            for piece in stream(m, tokenizer, messages, **settings):
                print(piece, end="", flush=True)
                reply += piece
            messages.append({"role": "assistant", "content": reply})
            print("\n")


if __name__ == "__main__":
    cli(main)
