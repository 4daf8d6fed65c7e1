"""Log-likelihoods of choices and of whole texts, as lm-evaluation-harness computes them."""

import itertools
from collections.abc import Iterator

import torch

from core.devices import to_device
from core.files import InputError
from core.head import token_logps
from core.prefixes import common_prefix
from core.tokenizer import Tokenizer
from evaluation.benchmarks import BENCHMARKS
from model import Qwen2

CACHE_TOKENS = 1 << 15  # KV-cache tokens of one forward, all rows together; bounds --batch-size


@torch.no_grad()
def choice_logps(
    model: Qwen2, tokenizer: Tokenizer, contexts: list[str], choices: list[list[str]], where: str = "--tasks"
) -> list[list[float]]:
    """The log-likelihoods of each context's choices, in nats. The prefix shared by all contexts is computed once.

    choices: a list for each context; each choice starts with a space. As in the harness, context and choice are encoded
    together and split at the token length of the context alone. where: the flag to name in an error.
    """
    starts = [len(tokenizer.encode(context)) for context in contexts]
    wholes = [[tokenizer.encode(context + choice) for choice in some] for context, some in zip(contexts, choices)]
    # a feed is a context with a choice, without the last token: one per context if every choice is a single token
    feeds = list(dict.fromkeys(tuple(ids[:-1]) for some in wholes for ids in some))
    longest, end = max(map(len, feeds)), model.config.max_position_embeddings
    if longest > end:
        raise InputError(
            f"{where}: a question takes {longest} tokens, the model has {end} positions; leave the task out"
        )
    shared = min(common_prefix(feeds) if len(feeds) > 1 else 0, min(starts) - 1)
    cache = model.new_cache(len(feeds), longest)
    if shared:
        prefix = model.new_cache(1, shared)
        model.prefill([feeds[0][:shared]], prefix)
        for row in range(len(feeds)):
            cache.copy_start(row, prefix, 0, shared)
    rest = [len(feed) - shared for feed in feeds]
    ends = dict(zip(feeds, itertools.accumulate(rest)))  # where each feed ends in the packed row
    at, targets, counts = [], [], []  # of the tokens of all choices, in order
    for start, some in zip(starts, wholes):
        for ids in some:
            feed_end = ends[tuple(ids[:-1])]
            at += range(feed_end - len(ids) + start, feed_end)
            targets += ids[start:]
            counts.append(len(ids) - start)
    packed = [[token for feed in feeds for token in feed[shared:]]]
    ids, at, targets = (to_device(x, model.device) for x in (packed, at, targets))
    hidden = model.hidden(ids, rest, cache, at)[0]  # (tokens of all choices, C)
    logps = token_logps(hidden, model.head_weight, targets).double().cpu()
    sums = iter(part.sum().item() for part in logps.split(counts))
    return [[next(sums) for _ in some] for some in wholes]


@torch.no_grad()
def text_logp(model: Qwen2, tokenizer: Tokenizer, text: str) -> tuple[float, int]:
    """The log-likelihood of a text in nats, and its number of tokens. tokenizer.prefix predicts the first token.

    A text longer than the model's positions is split into windows, as in the harness. Each window starts at the last
    token of the one before. The last window has as much context as the positions allow.
    """
    ids, size, total = [tokenizer.prefix, *tokenizer.encode(text)], model.config.max_position_embeddings, 0.0
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        window = to_device(ids[max(0, end - 1 - size) : end], model.device)  # at most size + 1 tokens
        targets = window[start - end :]
        at = torch.arange(len(window) - 1 - len(targets), len(window) - 1, device=model.device)
        hidden = model.hidden(window[None, :-1], [len(window) - 1], at=at)[0]
        total += token_logps(hidden, model.head_weight, targets).double().sum().item()
    return total, len(ids) - 1


def ask_likelihoods(
    model: Qwen2, tokenizer: Tokenizer, questions: list[dict], batch_size: int
) -> Iterator[tuple[int, dict]]:
    """Yields (index, record) of each question under --protocol loglik."""
    topic = lambda i: (questions[i]["task"], questions[i]["row"].get("subject"))
    for (task, _), group in itertools.groupby(range(len(questions)), key=topic):
        group, by = list(group), BENCHMARKS[task]["by"]
        texts = {i: questions[i]["messages"][0]["content"] for i in group}
        if by == "whole":
            for i in group:
                logp, tokens = text_logp(model, tokenizer, texts[i])
                yield i, {"reply": "", "logp": logp, "prompt_tokens": tokens}
            continue
        sizes = {i: len(tokenizer.encode(texts[i])) for i in group}
        # by letter: the questions of a subject share its examples. by text: the choices of a question share its context
        step = min(batch_size, max(1, CACHE_TOKENS // max(sizes.values()))) if by == "letter" else 1
        for part in (group[i : i + step] for i in range(0, len(group), step)):
            choices = [questions[i]["choices"] for i in part]
            found = choice_logps(model, tokenizer, [texts[i] for i in part], choices, f"--tasks {task}")
            for i, some, logps in zip(part, choices, found):
                best = max(range(len(some)), key=logps.__getitem__)
                yield i, {"reply": some[best].strip(), "logps": logps, "prompt_tokens": sizes[i]}
