"""Log-likelihoods of choices and texts."""

import itertools

import torch

from core.attention import to_device
from core.files import InputError
from core.layers import token_logps
from core.prefixes import common_prefix
from evaluation.benchmarks import BENCHMARKS

CACHE_TOKENS = 1 << 15  # of one forward's cache, all rows together, where --batch-size would take more

# ---------------------------------------------------------------- likelihoods


@torch.no_grad()
def choice_logps(m, tokenizer, contexts, choices, where="--tasks"):
    """The log-likelihoods of the choices of each of the contexts, whose common prefix is computed once.

    contexts: n texts. choices: n lists of texts, each with the space before it -> n lists of sums over a choice's tokens.
    Context and choice are encoded together and split at the context's own length, as the harness does. where: what an
    error names.
    """
    starts = [len(tokenizer.encode(context)) for context in contexts]
    wholes = [[tokenizer.encode(context + choice) for choice in some] for context, some in zip(contexts, choices)]
    # one feed per context where every choice is a single token, as letters are
    feeds = list(dict.fromkeys(tuple(ids[:-1]) for some in wholes for ids in some))
    longest = max(map(len, feeds))
    if longest > m.config.max_position_embeddings:
        raise InputError(
            f"{where}: a question with its examples takes {longest} tokens; the model ends at "
            f"{m.config.max_position_embeddings}: leave the task out"
        )
    shared = min(common_prefix(feeds) if len(feeds) > 1 else 0, min(starts) - 1)
    cache = m.new_cache(len(feeds), longest)
    if shared:
        first = m.new_cache(1, shared)
        m.prefill([feeds[0][:shared]], first)
        for row in range(len(feeds)):
            cache.copy_start(row, first, 0, shared)
    rest = [len(feed) - shared for feed in feeds]
    ends = dict(zip(feeds, itertools.accumulate(rest)))  # of each feed in the packed row
    at, targets, counts = [], [], []  # of all choices' tokens, in turn
    for start, some in zip(starts, wholes):
        for ids in some:
            at += range(ends[tuple(ids[:-1])] - len(ids) + start, ends[tuple(ids[:-1])])
            targets += ids[start:]
            counts.append(len(ids) - start)
    ids, at, targets = (to_device(x, m.device) for x in ([[t for feed in feeds for t in feed[shared:]]], at, targets))
    logps = (
        token_logps(m.hidden(ids, rest, cache, at)[0], m.head_weight, targets).double().cpu()
    )  # (tokens of all choices,)
    sums = iter(part.sum().item() for part in logps.split(counts))
    return [[next(sums) for _ in some] for some in wholes]


@torch.no_grad()
def text_logp(m, tokenizer, text):
    """(log-likelihood, tokens) of a text, every token given those before it, the first the tokenizer's prefix token.

    The harness' windows: a text longer than the model's positions is predicted by one full window after the other, each
    from the last token before it on; the last one reaches back as far as the positions go.
    """
    ids, size, total = [tokenizer.prefix, *tokenizer.encode(text)], m.config.max_position_embeddings, 0.0
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        window = to_device(ids[max(0, end - 1 - size) : end], m.device)  # at most size + 1
        targets = window[start - end :]
        at = torch.arange(len(window) - 1 - len(targets), len(window) - 1, device=m.device)
        hidden = m.hidden(window[None, :-1], [len(window) - 1], at=at)[0]
        total += token_logps(hidden, m.head_weight, targets).double().sum().item()
    return total, len(ids) - 1


# ---------------------------------------------------------------- asking a checkpoint


def ask_likelihoods(m, tokenizer, questions, batch_size):
    """Yields (index, record) of questions under --protocol loglik."""

    def topic(i):
        return questions[i]["task"], questions[i]["row"].get("subject")

    for (task, _), group in itertools.groupby(range(len(questions)), key=topic):
        group, by = list(group), BENCHMARKS[task]["by"]
        texts = {i: questions[i]["messages"][0]["content"] for i in group}
        sizes = {i: len(tokenizer.encode(texts[i])) for i in group}
        if by == "whole":
            for i in group:
                logp, tokens = text_logp(m, tokenizer, texts[i])
                yield i, {"reply": "", "logp": logp, "prompt_tokens": tokens}
            continue
        # letters: the questions of a subject share its examples; texts: the choices of one question share its context
        step = min(batch_size, max(1, CACHE_TOKENS // max(sizes.values()))) if by == "letter" else 1
        for part in (group[i : i + step] for i in range(0, len(group), step)):
            choices = [questions[i]["choices"] for i in part]
            for i, some, logps in zip(
                part, choices, choice_logps(m, tokenizer, [texts[i] for i in part], choices, f"--tasks {task}")
            ):
                best = max(range(len(some)), key=logps.__getitem__)
                yield i, {"reply": some[best].strip(), "logps": logps, "prompt_tokens": sizes[i]}
