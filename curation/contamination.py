"""Finds evaluation questions in texts by shared runs of tokens, also behind the signs of Markdown, LaTeX and HTML.

    questions = index(["How many eggs does ...?", ...])
    held = find_contamination(texts, questions)         # (N,) int64: the question that a text holds, -1 for none
    hashes, held = scan(texts, questions)               # simhashes too, in one pass

A text holds a question when it shares a run of LONG telling tokens with it, or all of a short question with few tokens around
it, or when it is the question but for one word: see match(). Tokens and their hashes are those of curation.dedup.
"""

import functools
import re
from collections.abc import Iterable

import numpy as np

from curation.dedup import batches, in_threads, majority, sign_hashes, token_hashes, windows

LONG, TELLING = 13, 9  # a run of 13 tokens, 9 of them different words, is not shared by chance
SHORT = 5  # a question of fewer tokens counts only as a whole text

# ---------------------------------------------------------------------------------------------------------------------
# Markup

_SYMBOLS = {"times": "×", "div": "÷", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "pm": "±", "circ": "°",
            "pi": "π", "infty": "∞", "sqrt": "√", "cdot": "·", "dots": "...", "ldots": "..."}  # fmt: skip
_COMMANDS = (  # LaTeX: pattern, replacement. The second time round they reach what was nested
    (re.compile(r"\\(?:text\w*|math\w+|emph|underline|boxed|fbox|mbox|operatorname)\*?\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"([\^_]|\\sqrt)\{([^{}]*)\}"), r"\1\2"),
)
_SIGNS = (  # pattern, replacement
    (re.compile(rf"\\({'|'.join(_SYMBOLS)})(?![a-zA-Z])"), lambda found: _SYMBOLS[found[1]]),
    (re.compile(r"\\(?:left|right|q?quad|displaystyle)(?![a-zA-Z])|\\[()\[\],;:! ]"), " "),
    (re.compile(r"\\([$%&#_{}])"), r"\1"),
    (re.compile(r"\$"), ""),  # math mode, and the currency too: a question about $5 is the same about 5
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
    """Removes the signs of Markdown, LaTeX and HTML that only format a text."""
    if not _MARKUP.search(text):
        return text
    if "\\" in text:
        for pattern, replacement in _COMMANDS * 2:
            text = pattern.sub(replacement, text)
    for pattern, replacement in _SIGNS:
        text = pattern.sub(replacement, text)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The index


@functools.cache
def uninformative_tokens():
    """Hashes of the tokens that do not tell texts apart: signs, single letters, numbers."""
    words = token_hashes([" ".join([*"abcdefghijklmnopqrstuvwxyz", *map(str, range(10_000))])])[0]
    return np.concatenate((words, sign_hashes()))


def unordered_hashes(hashes, counts, low, high):
    """Order-free hashes of the texts of `low` to `high` tokens, T of N texts with W tokens together.

    -> which (T,): their indices; sums (T,): the sum of a text's token hashes; owner (W,): the text of each token;
    tokens (W,); without (W,): the sum of the text's other tokens."""
    some = (counts >= low) & (counts <= high)
    which, n, tokens = np.flatnonzero(some), counts[some], hashes[np.repeat(some, counts)]
    sums = np.add.reduceat(tokens, np.cumsum(n) - n) if len(n) else tokens
    return which, sums, np.repeat(which, n), tokens, np.repeat(sums, n) - tokens


def telling_runs(hashes, counts):
    """All runs of LONG tokens with at least TELLING different informative ones -> (hashes (G,), text of each (G,))."""
    long = counts >= LONG
    if not long.any():
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    tokens = hashes[np.repeat(long, counts)]
    h, starts = windows(tokens, counts[long], LONG)
    run = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(h))))  # (G,): the text of each
    begin = (np.cumsum(counts[long]) - counts[long] - starts)[run] + np.arange(len(h))
    informative = np.where(np.isin(tokens, uninformative_tokens()), 0, tokens)
    runs = np.sort(np.lib.stride_tricks.sliding_window_view(informative, LONG)[begin], axis=1)  # (G, LONG)
    different = (runs[:, 0] != 0) + ((runs[:, 1:] != runs[:, :-1]) & (runs[:, 1:] != 0)).sum(1)
    enough = different >= TELLING
    return h[enough], np.flatnonzero(long)[run[enough]]


def question_hashes(hashes, counts):
    """Yields (kind, hashes, text of each), see index()."""
    h, owner = telling_runs(hashes, counts)
    yield "run", h, owner
    without_run = counts > 0
    without_run[owner] = False
    for k in np.unique(counts[without_run]).tolist():
        whole = without_run & (counts == k)
        yield k, windows(hashes[np.repeat(whole, counts)], counts[whole], k)[0], np.flatnonzero(whole)
    which, sums, owner, tokens, without = unordered_hashes(hashes, counts, SHORT, 2 * LONG - 1)
    yield "bag", sums, which
    informative = ~np.isin(tokens, uninformative_tokens())
    yield "less", without[informative], owner[informative]


def index(questions: Iterable[str]) -> dict:
    """Questions -> {kind: (sorted hashes, the question of each)}, for match(). The kinds of hashes:

    "run": runs of LONG tokens, without those that many texts share (a list of options, the matrix of 1 to 9,
    `public static void main`); k: a whole question of k tokens without such a run; "bag": a question of SHORT to
    2 * LONG - 1 tokens in any order; "less": the same with one informative token missing.
    A question with markup is indexed as it is and without the markup. Of equal questions the first counts."""
    texts = list(questions)
    plain = [(i, stripped) for i, text in enumerate(texts) if (stripped := strip_markup(text)) != text]
    owners = np.array([*range(len(texts)), *(i for i, _ in plain)], np.int64)
    found, at = {}, 0
    for chunk in batches([*texts, *(text for _, text in plain)]):
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
    """The index for responses: a response that is a question but for one word most likely repeats its own instruction."""
    return {kind: known for kind, known in questions.items() if kind not in ("bag", "less")}


# ---------------------------------------------------------------------------------------------------------------------
# The search


def match(hashes: np.ndarray, counts: np.ndarray, questions: dict) -> np.ndarray:
    """hashes, counts: of token_hashes() for N texts -> (N,) int64: the question of index() that a text holds, else -1.

    A text holds a question in one of three cases:
    - they share a telling run of LONG tokens;
    - the question has no such run, and the text has all of its tokens in a row. The text may have as many other tokens as
      the question has, at most LONG - 1, and none if the question has fewer than SHORT;
    - the text is a question of SHORT to 2 * LONG - 1 tokens with one word more or less, in any order."""
    out = np.full(len(counts), -1)

    def look_up(kind, h):
        known, owner = questions[kind]
        at = np.searchsorted(known, h).clip(max=len(known) - 1)
        return np.where(known[at] == h, owner[at], -1)

    for kind in questions.keys() - {"bag", "less"}:
        k, most = (LONG, np.inf) if kind == "run" else (kind, kind + min(kind, LONG - 1) if kind >= SHORT else kind)
        some = (counts >= k) & (counts <= most)
        if some.any():
            h, starts = windows(hashes[np.repeat(some, counts)], counts[some], k)
            out[some] = np.maximum(out[some], np.maximum.reduceat(look_up(kind, h), starts))
    if "bag" in questions:
        which, sums, owner, tokens, without = unordered_hashes(hashes, counts, SHORT - 1, 2 * LONG)
        if "less" in questions:
            out[which] = np.maximum(out[which], look_up("less", sums))
        hit = look_up("bag", without)
        few = np.flatnonzero(hit >= 0)
        few = few[~np.isin(tokens[few], uninformative_tokens())]
        np.maximum.at(out, owner[few], hit[few])
    return out


def match_texts(texts: list[str], tokens: tuple, questions: dict) -> np.ndarray:
    """match() of a list of texts, as they are and without their markup. tokens: token_hashes(texts)."""
    held = match(*tokens, questions)
    plain = (
        [(i, stripped) for i, text in enumerate(texts) if (stripped := strip_markup(text)) != text] if questions else []
    )
    if plain:
        which = np.array([i for i, _ in plain])
        held[which] = np.maximum(held[which], match(*token_hashes([text for _, text in plain]), questions))
    return held


def find_contamination(texts: Iterable[str], questions: dict) -> np.ndarray:
    """-> (N,) int64: the question of index() that each text holds, -1 for none."""
    work = lambda chunk: match_texts(chunk, token_hashes(chunk), questions)  # noqa: E731
    return np.concatenate([np.empty(0, np.int64), *in_threads(work, batches(texts))])


def scan(texts: Iterable[str], questions: dict, n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """simhash() and find_contamination() in one pass -> (N,) uint64, (N,) int64."""

    def work(chunk):
        tokens = token_hashes(chunk)
        return majority(*windows(*tokens, n)), match_texts(chunk, tokens, questions)

    parts = [(np.empty(0, np.uint64), np.empty(0, np.int64)), *in_threads(work, batches(texts))]
    return tuple(np.concatenate(part) for part in zip(*parts))
