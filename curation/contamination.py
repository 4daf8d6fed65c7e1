"""Finds evaluation questions in texts by shared runs of tokens. Markdown, LaTeX and HTML markup does not hide them.

    questions = build_index(["How many eggs does ...?", ...])
    found = find_contamination(texts, questions)             # (N,) int64: index of the question in each text, -1: none
    hashes, found = simhash_and_match(texts, questions)      # simhashes too, in one pass

A text contains a question in three cases:
- Both share a run of LONG informative tokens.
- The text consists of a short question and few other tokens.
- The text differs from the question in one word.
match() has the exact rules. curation.dedup splits texts into tokens and hashes them.
"""

import functools
import re
from collections.abc import Iterable, Iterator

import numpy as np

from curation.dedup import hash_ngrams, in_threads, majority_bits, sign_hashes, text_batches, token_hashes

LONG, MIN_INFORMATIVE = 13, 9  # two texts do not share 13 tokens in a row by chance if 9 of them are different words
SHORT = 5  # a question of fewer tokens counts only as a whole text

# ---------------------------------------------------------------------------------------------------------------------
# Markup

_SYMBOLS = {"times": "×", "div": "÷", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "pm": "±"}
_SYMBOLS |= {"circ": "°", "pi": "π", "infty": "∞", "sqrt": "√", "cdot": "·", "dots": "...", "ldots": "..."}
_COMMANDS = (  # LaTeX: pattern, replacement. Applied twice, for nested commands
    (re.compile(r"\\(?:text\w*|math\w+|emph|underline|boxed|fbox|mbox|operatorname)\*?\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"([\^_]|\\sqrt)\{([^{}]*)\}"), r"\1\2"),
)
_SIGNS = (  # pattern, replacement
    (re.compile(rf"\\({'|'.join(_SYMBOLS)})(?![a-zA-Z])"), lambda found: _SYMBOLS[found[1]]),
    (re.compile(r"\\(?:left|right|q?quad|displaystyle)(?![a-zA-Z])|\\[()\[\],;:! ]"), " "),
    (re.compile(r"\\([$%&#_{}])"), r"\1"),
    (re.compile(r"\$"), ""),  # math mode, and the currency sign: $5 becomes 5
    (re.compile(r"</?[a-zA-Z][a-zA-Z0-9]{0,10}(?: [^<>\n]{0,200})?/?>"), " "),  # HTML tags
    (re.compile(r"!?\[([^\[\]\n]{1,300})\]\([^()\s]{1,300}\)"), r"\1"),  # [text](link)
    (re.compile(r"^[ \t]*(?:#{1,6} |> ?|[-*+] )+", re.M), ""),  # headings, quotes, list items
    (re.compile(r"~~|\|"), " "),  # struck out, tables
    # **bold**, *italic*, _italic_; "2 * 3 * 4" and "2*3*4" are products, and a_b_c is a name
    (re.compile(r"\*\*(?=[^\s*])(.{1,400}?)(?<=\S)\*\*"), r"\1"),
    (re.compile(r"(?<![A-Za-z0-9*])\*(?=[^\s*])(.{1,400}?)(?<=[^\s*])\*(?![A-Za-z0-9*])"), r"\1"),
    (re.compile(r"(?<![^\W_])_{1,3}(?=[^\s_])(.{1,400}?)(?<=[^\s_])_{1,3}(?![^\W_])"), r"\1"),
)
_MARKUP = re.compile(r"[\\$<*_~|\[#>]|^[ \t]*[-+] ", re.M)


def strip_markup(text: str) -> str:
    """Removes the markup of Markdown, LaTeX and HTML."""
    if not _MARKUP.search(text):
        return text
    if "\\" in text:
        for pattern, replacement in _COMMANDS * 2:
            text = pattern.sub(replacement, text)
    for pattern, replacement in _SIGNS:
        text = pattern.sub(replacement, text)
    return text


def without_markup(texts: list[str]) -> dict[int, str]:
    """{index: text without its markup} of the texts that have markup."""
    return {i: stripped for i, text in enumerate(texts) if (stripped := strip_markup(text)) != text}


# ---------------------------------------------------------------------------------------------------------------------
# The index


@functools.cache
def uninformative_tokens() -> np.ndarray:
    """Hashes of tokens that occur in most texts: signs, single letters, numbers."""
    words = token_hashes([" ".join([*"abcdefghijklmnopqrstuvwxyz", *map(str, range(10_000))])])[0]
    return np.concatenate((words, sign_hashes()))


def unordered_hashes(hashes: np.ndarray, counts: np.ndarray, low: int, high: int) -> tuple[np.ndarray, ...]:
    """Hashes the T texts that have `low` to `high` tokens, without regard to word order. W: tokens in total.

    -> which (T,): indices of these texts; sums (T,): sum of each text's token hashes; owner (W,): index of each token's
    text; tokens (W,): token hashes; without (W,): sum of the text's token hashes without this token.
    """
    fits = (counts >= low) & (counts <= high)
    which, n, tokens = np.flatnonzero(fits), counts[fits], hashes[np.repeat(fits, counts)]
    sums = np.add.reduceat(tokens, np.cumsum(n) - n) if len(n) else tokens
    return which, sums, np.repeat(which, n), tokens, np.repeat(sums, n) - tokens


def informative_runs(hashes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds runs of LONG tokens, of which at least MIN_INFORMATIVE are different and informative.

    -> (hashes (G,), index of each run's text (G,))
    """
    long = counts >= LONG
    if not long.any():
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    tokens = hashes[np.repeat(long, counts)]
    h, starts = hash_ngrams(tokens, counts[long], LONG)
    run = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(h))))  # (G,): index of each run's text
    begin = (np.cumsum(counts[long]) - counts[long] - starts)[run] + np.arange(len(h))
    informative = np.where(np.isin(tokens, uninformative_tokens()), 0, tokens)
    runs = np.sort(np.lib.stride_tricks.sliding_window_view(informative, LONG)[begin], axis=1)  # (G, LONG)
    different = (runs[:, 0] != 0) + ((runs[:, 1:] != runs[:, :-1]) & (runs[:, 1:] != 0)).sum(1)
    enough = different >= MIN_INFORMATIVE
    return h[enough], np.flatnonzero(long)[run[enough]]


def question_hashes(hashes: np.ndarray, counts: np.ndarray) -> Iterator[tuple[str | int, np.ndarray, np.ndarray]]:
    """Yields (kind, hashes, index of each hash's text). See build_index() for the kinds."""
    h, owner = informative_runs(hashes, counts)
    yield "run", h, owner
    without_run = counts > 0
    without_run[owner] = False
    for k in np.unique(counts[without_run]).tolist():
        whole = without_run & (counts == k)
        yield k, hash_ngrams(hashes[np.repeat(whole, counts)], counts[whole], k)[0], np.flatnonzero(whole)
    which, sums, owner, tokens, without = unordered_hashes(hashes, counts, SHORT, 2 * LONG - 1)
    yield "unordered", sums, which
    informative = ~np.isin(tokens, uninformative_tokens())
    yield "one less", without[informative], owner[informative]


def build_index(questions: Iterable[str]) -> dict:
    """Indexes questions for match() -> {kind: (sorted hashes, index of each hash's question)}. The kinds of hashes:

    "run": a run of LONG tokens. Runs with few informative tokens are left out, such as `public static void main`.
    k, an integer: a whole question of k tokens that contains no such run.
    "unordered": a question of SHORT to 2 * LONG - 1 tokens, in any order.
    "one less": the same without one informative token.
    A question with markup is indexed twice, with and without the markup. Equal questions get the index of the first.
    """
    texts = list(questions)
    marked_up = without_markup(texts)
    owners = np.array([*range(len(texts)), *marked_up], np.int64)
    found, at = {}, 0
    for chunk in text_batches([*texts, *marked_up.values()]):
        for kind, h, owner in question_hashes(*token_hashes(chunk)):
            found.setdefault(kind, []).append((h, owners[at + owner]))
        at += len(chunk)
    out = {}
    for kind, parts in found.items():
        hashes, owner = (np.concatenate(part) for part in zip(*parts))
        order = np.lexsort((owner, hashes))
        hashes, first = np.unique(hashes[order], return_index=True)
        if len(hashes):
            out[kind] = hashes, owner[order][first]
    return out


def without_near_questions(questions: dict) -> dict:
    """The index for responses. It leaves out the kinds "unordered" and "one less".

    A response that differs from a question in one word most likely repeats its own instruction.
    """
    return {kind: known for kind, known in questions.items() if kind not in ("unordered", "one less")}


# ---------------------------------------------------------------------------------------------------------------------
# The search


def match(hashes: np.ndarray, counts: np.ndarray, questions: dict) -> np.ndarray:
    """Finds the question that each text contains -> (N,) int64: index of the question, -1 for none.

    hashes, counts: from token_hashes() of N texts. questions: from build_index(). A text contains a question if:
    - Both contain the same informative run of LONG tokens.
    - The question has no such run, and all its tokens occur in the text in a row. The text may have at most as many
      other tokens as the question has, and at most LONG - 1. It may have none if the question is shorter than SHORT.
    - The question has SHORT to 2 * LONG - 1 tokens. The text has the same words in any order, with one more or less.
    """
    out = np.full(len(counts), -1)

    def find_owner(kind: str | int, h: np.ndarray) -> np.ndarray:
        known, owner = questions[kind]
        at = np.searchsorted(known, h).clip(max=len(known) - 1)
        return np.where(known[at] == h, owner[at], -1)

    for kind in questions.keys() - {"unordered", "one less"}:
        if kind == "run":
            k, most = LONG, np.inf
        else:
            k, most = kind, kind + min(kind, LONG - 1) if kind >= SHORT else kind
        fits = (counts >= k) & (counts <= most)
        if fits.any():
            h, starts = hash_ngrams(hashes[np.repeat(fits, counts)], counts[fits], k)
            out[fits] = np.maximum(out[fits], np.maximum.reduceat(find_owner(kind, h), starts))
    if "unordered" in questions:
        which, sums, owner, tokens, without = unordered_hashes(hashes, counts, SHORT - 1, 2 * LONG)
        if "one less" in questions:  # the text lacks one word of the question
            out[which] = np.maximum(out[which], find_owner("one less", sums))
        found = find_owner("unordered", without)  # the text has one word more than the question
        hits = np.flatnonzero(found >= 0)
        hits = hits[~np.isin(tokens[hits], uninformative_tokens())]
        np.maximum.at(out, owner[hits], found[hits])
    return out


def match_texts(texts: list[str], tokens: tuple, questions: dict) -> np.ndarray:
    """Runs match() on texts with and without their markup. tokens: token_hashes(texts)."""
    found = match(*tokens, questions)
    marked_up = without_markup(texts) if questions else {}
    if marked_up:
        which = np.array(list(marked_up))
        found[which] = np.maximum(found[which], match(*token_hashes(list(marked_up.values())), questions))
    return found


def find_contamination(texts: Iterable[str], questions: dict) -> np.ndarray:
    """-> (N,) int64: index of the question that each text contains, -1 for none."""
    parts = in_threads(lambda chunk: match_texts(chunk, token_hashes(chunk), questions), text_batches(texts))
    return np.concatenate([np.empty(0, np.int64), *parts])


def simhash_and_match(texts: Iterable[str], questions: dict, n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """simhash() and find_contamination() in one pass -> (N,) uint64, (N,) int64."""

    def work(chunk: list[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens = token_hashes(chunk)
        return majority_bits(*hash_ngrams(*tokens, n)), match_texts(chunk, tokens, questions)

    parts = [(np.empty(0, np.uint64), np.empty(0, np.int64)), *in_threads(work, text_batches(texts))]
    return tuple(np.concatenate(part) for part in zip(*parts))
