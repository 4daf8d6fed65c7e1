"""Batched generation without padding: a finished row is replaced at once, and shared prefixes are computed once.

    texts = generate(model, tokenizer, [[{"role": "user", "content": "Hello"}], ...], max_new_tokens=100)
    python generate.py --ckpt C --prompt "Why is the sky blue?"

Each row has its own KV cache, positions and random numbers, so the other prompts change a reply only by rounding. A
sampled reply also depends on its seed: give one for each prompt, or one number, from which each prompt's seed follows
by its index.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
from core.files import InputError, check_arguments, cli, visible
from core.flags import parse_generate_args as parse_args

if __name__ == "__main__":
    check_arguments(parse_args)  # before torch is loaded, so that --help and wrong flags are answered at once

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.attention import KVCache
from core.checkpoint import Checkpoint
from core.conversations import as_messages
from core.cuda_graph import capture_graph
from core.devices import DTYPES, choose_device, to_device
from core.layers import fused
from core.onednn import onednn_weights
from core.prefixes import SharedPrefixes
from core.sampling import penalise, sample
from core.tokenizer import Tokenizer
from model import Qwen2

Prompt = str | list[dict]  # a user's message, or a list of messages


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of generate, generate_iter, generate_steps and stream."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together reach this probability
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()  # a reply ends before the first of these strings
    seed: int | Sequence[int] = 0  # one for each prompt, or one number: see row_seed
    batch_size: int = 32  # rows in flight, fewer if cache_gb is too small for them
    cache_gb: float = 4.0  # size of the KV cache in GiB
    prefill_tokens: int = 4096  # maximum prompt tokens in one forward; further prompts start in the next step
    steps_per_sync: int | None = None  # decoding steps per copy of the tokens to the host. None: 16 on a GPU, else 1

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.temperature < 0:
            values = f"max_new_tokens is {self.max_new_tokens}, temperature {self.temperature}"
            raise InputError(f"{values}; they must be at least 1 and at least 0")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def row_seed(self, i: int) -> int:
        """The seed of prompt i. It follows from `seed` and i, or is the i-th of several."""
        return (self.seed * 1_000_003 + i) % 2**63 if isinstance(self.seed, int) else self.seed[i]


# ---------------------------------------------------------------------------------------------------------------------
# The batch


@dataclass
class Row:
    """A prompt in flight. Row r of the batch is row r of the KV cache."""

    index: int  # of the prompt
    limit: int  # maximum length of the reply
    pending: list[int]  # tokens that the model reads in the next step: the prompt, later the last token
    generator: torch.Generator
    reply: list[int] = field(default_factory=list)


@dataclass
class Batch:
    """The rows in flight and their tensors.

    CUDA graphs read and write last_tokens, uniform, seen and cache.positions, so these are never replaced.
    """

    model: Qwen2
    settings: Settings
    cache: KVCache
    seen: Tensor | None  # (rows, max_len), for a repetition penalty: each row's tokens, padded with its first one
    last_tokens: Tensor  # (rows,)
    uniform: Tensor  # (rows,), random numbers in [0, 1)
    rows: list[Row] = field(default_factory=list)
    graphs: dict[int, Callable[[], None]] = field(default_factory=dict)  # {cache.width: decoding_step(batch)}
    graph_pool: tuple[int, int] | None = None  # memory that the graphs share, as only one runs at a time


def new_batch(model: Qwen2, settings: Settings, rows: int, max_len: int) -> Batch:
    """An empty batch with room for `rows` rows of at most max_len tokens each, prompt and reply."""
    cache = model.new_cache(rows, max_len)
    cache.lengths = []  # no row is in use yet
    last_tokens, uniform = cache.positions.clone(), torch.zeros(rows, device=model.device)
    seen = cache.positions.new_zeros(rows, max_len) if settings.repetition_penalty != 1.0 else None
    return Batch(model, settings, cache, seen, last_tokens, uniform)


def remove_row(batch: Batch, r: int) -> None:
    """Frees a row. The last row moves into its place."""
    batch.cache.remove(r)
    if batch.seen is not None:
        batch.seen[r] = batch.seen[len(batch.rows) - 1]
    batch.rows[r] = batch.rows[-1]
    batch.rows.pop()


@dataclass
class WaitingPrompts:
    """All prompts, and the ones that have not started yet."""

    prompts: list[list[int]]
    limits: list[int]  # maximum length of each reply
    prefixes: SharedPrefixes
    order: list[int]  # indices of the prompts that have not started yet, in starting order


def admit(batch: Batch, waiting: WaitingPrompts) -> None:
    """Fills free rows with waiting prompts of at most prefill_tokens tokens in total. A longer prompt starts alone."""
    budget = prefill_tokens = batch.settings.prefill_tokens
    while waiting.order and len(batch.rows) < batch.cache.rows:
        i, row = waiting.order[0], len(batch.rows)
        pending = waiting.prefixes.rest(i)
        if budget < min(len(pending), prefill_tokens):
            break
        waiting.order.pop(0)
        budget -= len(pending)
        batch.cache.lengths.append(0)
        waiting.prefixes.copy(i, batch.cache, row)
        if batch.seen is not None:
            prompt = waiting.prompts[i]
            batch.seen[row] = prompt[0]
            batch.seen[row, : len(prompt)] = to_device(prompt, batch.seen.device)
        generator = torch.Generator().manual_seed(batch.settings.row_seed(i))
        batch.rows.append(Row(i, waiting.limits[i], pending, generator))


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def next_steps(batch: Batch) -> list[list[int]]:
    """The next tokens: a list of steps, each with one token for every row."""
    steps = batch.settings.steps_per_sync or (16 if batch.model.device.type == "cuda" and fused() else 1)
    if steps > 1 and all(len(row.pending) == 1 for row in batch.rows):
        return decode_steps(batch, min(steps, max(row.limit - len(row.reply) for row in batch.rows)))
    return [packed_step(batch)]


def packed_step(batch: Batch) -> list[int]:
    """One packed forward: first the decoding rows, with one token each, then the new rows, with their prompts."""
    model, device = batch.model, batch.model.device
    lengths = [len(row.pending) for row in batch.rows]
    ids = to_device([[token for row in batch.rows for token in row.pending]], device)  # (1, T)
    last = to_device(lengths, device).cumsum(0) - 1
    logits = model.head(model.hidden(ids, lengths, batch.cache, last)[0]).float()  # (rows, V)
    positions, uniform = to_device(batch.cache.lengths, device) - 1, to_device(draw(batch, 1)[0], device)
    return next_tokens(batch, logits, uniform, ids[0, last], positions).tolist()


def next_tokens(batch: Batch, logits: Tensor, uniform: Tensor, last_tokens: Tensor, positions: Tensor) -> Tensor:
    """The next token of each row, (n,). logits: (n, V). uniform, last_tokens, positions (of last_tokens): (n,)."""
    settings = batch.settings
    if batch.seen is not None:
        seen = batch.seen[: len(last_tokens)].scatter_(1, positions[:, None], last_tokens[:, None])
        penalise(logits, seen, settings.repetition_penalty)
    return sample(logits, uniform, settings.temperature, settings.top_k, settings.top_p)


def draw(batch: Batch, steps: int) -> Tensor:
    """Random numbers (steps, rows) in [0, 1), from each row's own generator. Zeros at temperature 0."""
    if batch.settings.temperature == 0:
        return torch.zeros(steps, len(batch.rows))
    return torch.stack([torch.rand(steps, generator=row.generator) for row in batch.rows], dim=1)


def decode_steps(batch: Batch, steps: int) -> list[list[int]]:
    """Runs several decoding steps and copies their tokens to the host once, so that a GPU does not wait for the host.

    A row that ends in between continues; the caller drops the extra tokens.
    """
    cache, n = batch.cache, len(batch.rows)
    cache.width = min(-(-(max(cache.lengths) + steps) // 256) * 256, cache.max_len)  # few widths, so few graphs
    pending = [row.pending[0] for row in batch.rows]
    for buffer, values in ((cache.positions, cache.lengths), (batch.last_tokens, pending)):
        buffer[:n] = torch.tensor(values)
        buffer[n:] = 0
    if cache.width not in batch.graphs:
        batch.graphs[cache.width] = decoding_step(batch)
    uniform, chosen = draw(batch, steps).to(batch.uniform.device), batch.last_tokens.new_empty(steps, n)
    for i in range(steps):
        batch.uniform[:n] = uniform[i]
        batch.graphs[cache.width]()
        chosen[i] = batch.last_tokens[:n]
    cache.lengths = [min(length + steps, cache.max_len) for length in cache.lengths]
    return chosen.tolist()


def decoding_step(batch: Batch) -> Callable[[], None]:
    """Returns a function that decodes one token for all rows of the cache and writes it to last_tokens.

    Its tensors have the same shapes and addresses in each call, and the host reads none of their values. On a GPU it
    replays one CUDA graph.
    """
    model, cache = batch.model, batch.cache

    def step() -> None:
        logits = model.head(model.hidden(batch.last_tokens[:, None], cache=cache)[:, 0]).float()  # (rows, V)
        batch.last_tokens.copy_(next_tokens(batch, logits, batch.uniform, batch.last_tokens, cache.positions))
        cache.positions.add_(1).clamp_max_(cache.max_len - 1)  # a finished row stays inside the cache

    if not batch.last_tokens.is_cuda or not fused():
        return step
    # the warm-up calls before the capture also write keys and values, but the next step overwrites them
    batch.graph_pool = batch.graph_pool or torch.cuda.graph_pool_handle()
    state = [x for x in (batch.last_tokens, cache.positions, batch.seen) if x is not None]
    return capture_graph(step, state, batch.graph_pool)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def generate_steps(
    model: Qwen2, tokenizer: Tokenizer, prompts: Sequence[Prompt], **settings: object
) -> Iterator[tuple[int, list[int], str | None]]:
    """Yields (index of the prompt, tokens so far, finish_reason or None) for each row after each step.

    finish_reason: "stop" after an end token (which is dropped) or a stop string; "length" after max_new_tokens or at
    the model's last position. settings: see Settings.
    """
    settings = Settings(**settings)
    prompts = encode_prompts(tokenizer, prompts)
    if not prompts:
        return
    limits = reply_limits(prompts, model.config.max_position_embeddings, settings.max_new_tokens)
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    fitting = settings.cache_gb * 2**30 / model.new_cache(1, longest, "meta").bytes
    batch = new_batch(model, settings, max(1, int(min(settings.batch_size, len(prompts), fitting))), longest)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))  # similar lengths share a batch
    waiting = WaitingPrompts(prompts, limits, SharedPrefixes(model, prompts), order)
    with onednn_weights(model) if len(prompts) > 1 else contextlib.nullcontext():
        while waiting.order or batch.rows:
            admit(batch, waiting)
            steps = next_steps(batch)
            for r in reversed(range(len(batch.rows))):  # backwards: remove_row moves the last row, already handled
                row = batch.rows[r]
                for token in (step[r] for step in steps):
                    finish = append_token(row, token, tokenizer, settings.stop_strings)
                    yield row.index, row.reply, finish
                    if finish:
                        remove_row(batch, r)
                        break


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Tokens of the prompts. InputError for anything that is not a prompt."""
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, dict):
            raise InputError(
                f"prompt {i}: expected a text or a list of messages, found one message; wrap a conversation in a list"
            )
    return [tokenizer.prompt_ids(as_messages(prompt, f"prompt {i}")) for i, prompt in enumerate(prompts)]


def reply_limits(prompts: list[list[int]], positions: int, max_new_tokens: int) -> list[int]:
    """The maximum length of each reply. InputError if a prompt fills all of the model's positions."""
    for i, prompt in enumerate(prompts):
        if len(prompt) >= positions:
            fault = f"prompt {i} takes {len(prompt)} tokens; the model ends at {positions}"
            raise InputError(f"{fault}, so it has no room for a reply: shorten the prompt")
    return [min(max_new_tokens, positions - len(prompt)) for prompt in prompts]


def append_token(row: Row, token: int, tokenizer: Tokenizer, stop_strings: list[str]) -> str | None:
    """Adds a token to the row's reply unless it is an end token. -> finish_reason, or None if the reply continues."""
    row.pending = [token]
    if token in tokenizer.stop_ids:
        return "stop"
    row.reply.append(token)
    if stop_strings:
        tail = row.reply[-4 * max(map(len, stop_strings)) :]  # a character is at most 4 bytes, so at most 4 tokens
        if any(text in tokenizer.decode(tail) for text in stop_strings):
            return "stop"
    return "length" if len(row.reply) == row.limit else None


def generate_iter(
    model: Qwen2, tokenizer: Tokenizer, prompts: Sequence[Prompt], **settings: object
) -> Iterator[tuple[int, str, str]]:
    """Yields (index, text, finish_reason) of each prompt as it finishes, in any order. settings: see Settings."""
    stop_strings = Settings(**settings).stop_strings
    for i, tokens, finish in generate_steps(model, tokenizer, prompts, **settings):
        if finish:
            text = tokenizer.decode(tokens)
            end = min((at for s in stop_strings if (at := text.find(s)) >= 0), default=None)
            yield i, text[:end], finish


def generate(
    model: Qwen2,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    **settings: object,
) -> list[str]:
    """The replies to the prompts, message lists or texts, in the same order. settings: see Settings.

    To sample several replies to one prompt, repeat the prompt: it is computed once.
    """
    texts, settings = [""] * len(prompts), settings | {"max_new_tokens": max_new_tokens, "temperature": temperature}
    for i, text, _ in generate_iter(model, tokenizer, prompts, **settings):
        texts[i] = text
    return texts


def stream(model: Qwen2, tokenizer: Tokenizer, messages: Prompt, **settings: object) -> Iterator[str]:
    """Yields one reply piece by piece. A piece never ends inside a character that takes several tokens."""
    length = 0
    for _, tokens, finish in generate_steps(model, tokenizer, [messages], **settings):
        text = tokenizer.decode(tokens)
        if finish or not text.endswith("\ufffd"):
            yield text[length:]
            length = len(text)


# ---------------------------------------------------------------------------------------------------------------------
# The command

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "cache_gb")


def chat(model: Qwen2, tokenizer: Tokenizer, system: list[dict], settings: dict) -> None:
    """Chats in the terminal. system: a list with the system message, or empty."""
    messages = list(system)
    print("An empty line ends the chat.")
    with contextlib.suppress(EOFError):
        while text := input("> ").strip():
            messages.append({"role": "user", "content": text})
            reply = ""
            for piece in stream(model, tokenizer, messages, **settings):
                print(visible(piece), end="", flush=True)
                reply += piece
            messages.append({"role": "assistant", "content": reply})
            print("\n")


def load_for_inference(source: str, args: argparse.Namespace) -> tuple[Qwen2, Tokenizer]:
    """A checkpoint (hub id, folder or .pt file) in the dtype and on the device of the flags, and its tokenizer."""
    choose_device(args)
    ckpt = Checkpoint(source)
    return Qwen2.from_pretrained(ckpt, DTYPES[args.dtype], args.device).eval(), Tokenizer(ckpt)


def check_loadable(source: str | Checkpoint) -> Checkpoint:
    """Opens a checkpoint. InputError unless tensors and config fit, and the tokenizer is usable. Reads no weights.

    For commands that load the model later, after work that would be lost.
    """
    ckpt = source if isinstance(source, Checkpoint) else Checkpoint(source)
    Qwen2.on_meta(ckpt)
    Tokenizer(ckpt)
    return ckpt


def main() -> None:
    args = parse_args()
    if not args.prompt and sys.stdin is None:  # closed, as with <&-
        raise InputError("there is no input for a chat; give --prompt")
    model, tokenizer = load_for_inference(args.ckpt, args)
    settings = {name: getattr(args, name) for name in SAMPLING}
    system = [{"role": "system", "content": args.system}] if args.system else []
    if not args.prompt:
        return chat(model, tokenizer, system, settings)
    prompts = [system + [{"role": "user", "content": text}] for text in args.prompt]
    for text, reply in zip(args.prompt, generate(model, tokenizer, prompts, **settings)):
        print(visible(f"> {text}\n{reply}\n"))


if __name__ == "__main__":
    cli(main)
