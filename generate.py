"""Batched generation over model.py: ragged prompts without padding, continuous refill, a shared prefix computed once.

    texts = generate(m, tokenizer, [[{"role": "user", "content": "Hello"}], ...], max_new_tokens=100)
    python generate.py --ckpt C --prompt "Why is the sky blue?"

A row's output does not depend on its neighbours: each has its own cache row, its own positions and its own random numbers.
"""

import argparse

import torch

from chat import Tokenizer
from model import Checkpoint, InputError, KVCache, Qwen2, cli

# ---------------------------------------------------------------------------------------------------------------------
# Choosing the next token


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token a row by inverting the cumulative distribution. logits: (B, V) fp32, uniform: (B,) in [0, 1) -> (B,).

    temperature 0 is greedy. top_k keeps the k likeliest tokens (0: all), top_p the fewest whose probability reaches p
    (arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)  # (B, V)
    before = p.cumsum(-1) - p  # the probability of everything likelier
    p = p.masked_fill(before >= top_p, 0.0)
    if top_k:
        p[:, top_k:] = 0.0
    cumulative = p.double().cumsum(-1)
    pick = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)
    return order.gather(1, pick.clamp_max(logits.shape[1] - 1))[:, 0]


def common_prefix(sequences):
    """The length of the prefix that all sequences share, at least one token short of the shortest."""
    first, last = min(sequences), max(sequences)  # in lexicographic order, all others lie between these two
    limit = min(map(len, sequences)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@torch.no_grad()
def generate_iter(
    m, tokenizer, prompts, max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, seed=0, batch_size=32,
    prefill_tokens=4096,
):  # fmt: skip
    """Yields (index, text, finish_reason) for each prompt as it finishes; the order is not that of the prompts.

    prompts: message lists. finish_reason: "stop" after one of the model's end tokens, "length" after max_new_tokens.
    batch_size: sequences in flight. prefill_tokens bounds the prompt tokens of one forward; more prompts wait a step.
    """
    prompts = [tokenizer.prompt_ids(p) for p in prompts]
    if not prompts:
        return
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > m.config.max_position_embeddings:
        raise InputError(f"a prompt and its reply may take {longest} tokens; the model ends at {m.config.max_position_embeddings}")
    dtype, device = m.compute_dtype or m.head_weight.dtype, m.device
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # rows of like length share the batch
    cache = KVCache(m.config, min(batch_size, len(prompts)), longest, dtype, device)

    shared = common_prefix(prompts) if len(prompts) > 1 else 0
    prefix = KVCache(m.config, 1, shared, dtype, device)
    if shared:
        prefix.lengths = [0]
        m.hidden(torch.tensor([prompts[0][:shared]], device=device), [shared], prefix)

    rows = []  # in flight, one a row of the cache: {"index", "new": tokens so far, "feed": tokens the model sees next}
    while waiting or rows:
        budget = prefill_tokens
        while waiting and len(rows) < cache.k.shape[1]:
            i = waiting[0]
            feed = prompts[i][shared:]
            if budget < len(feed) and budget < prefill_tokens:
                break
            budget -= len(feed)
            waiting.pop(0)
            cache.k[:, len(rows), :, :shared] = prefix.k[:, 0]
            cache.v[:, len(rows), :, :shared] = prefix.v[:, 0]
            cache.lengths.append(shared)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + i)  # of this row alone
            rows.append({"index": i, "new": [], "feed": feed, "generator": generator})

        # One forward for all rows: a new row feeds its prompt, the others their last token.
        lengths = [len(row["feed"]) for row in rows]
        ids = torch.tensor([[t for row in rows for t in row["feed"]]], device=device)  # (1, T)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        logits = m.head(m.hidden(ids, lengths, cache)[0, last]).float()  # (rows, V)
        uniform = torch.zeros(len(rows))
        if temperature > 0:
            uniform = torch.stack([torch.rand((), generator=row["generator"]) for row in rows])
        tokens = sample(logits, uniform.to(device), temperature, top_k, top_p).tolist()

        for r in reversed(range(len(rows))):  # backwards: remove() moves the last row, which has been looked at
            row, token = rows[r], tokens[r]
            row["feed"] = [token]
            if token not in tokenizer.stop_ids:
                row["new"].append(token)
                if len(row["new"]) < max_new_tokens:
                    continue
            yield row["index"], tokenizer.decode(row["new"]), "stop" if token in tokenizer.stop_ids else "length"
            cache.remove(r)
            rows[r] = rows[-1]
            rows.pop()


def generate(m, tokenizer, prompts, max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, seed=0, batch_size=32):
    """prompts: list of message lists -> their replies, a list of texts in the same order. Arguments as in generate_iter."""
    texts = [""] * len(prompts)
    for i, text, _ in generate_iter(m, tokenizer, prompts, max_new_tokens, temperature, top_k, top_p, seed, batch_size):
        texts[i] = text
    return texts


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", required=True, help="hub id, directory or .pt file")
    p.add_argument("--prompt", nargs="+", help="one or several user messages; without it, a chat in the terminal")
    p.add_argument("--system", help="system prompt instead of the template's default")
    # sampling
    p.add_argument("--max-new-tokens", type=int, default=512, help="most tokens of a reply")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    p.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens that reach this probability")
    p.add_argument("--seed", type=int, default=0, help="of the sampling")
    # machine
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and computation")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    a = p.parse_args()
    ckpt = Checkpoint(a.ckpt)
    m = Qwen2.from_pretrained(ckpt, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[a.dtype], device=a.device)
    tokenizer = Tokenizer(ckpt)
    settings = dict(max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, seed=a.seed)
    system = [{"role": "system", "content": a.system}] if a.system else []
    if a.prompt:
        prompts = [system + [{"role": "user", "content": text}] for text in a.prompt]
        for text, reply in zip(a.prompt, generate(m, tokenizer, prompts, **settings)):
            print(f"> {text}\n{reply}\n")
        return
    messages = list(system)
    print("An empty line ends the chat.")
    while text := input("> ").strip():
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": generate(m, tokenizer, [messages], **settings)[0]})
        print(messages[-1]["content"] + "\n")


if __name__ == "__main__":
    cli(main)
