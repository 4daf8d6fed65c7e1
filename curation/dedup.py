"""Finds near duplicates by simhash, in numpy on arrays of 64-bit hashes.

    hashes = simhash(texts)                          # (N,) uint64
    keep, twin = keep_best(hashes, rank, hamming=3)  # keeps the best text of every group of near duplicates
    python -m curation.dedup 1000000                 # measures time and memory on synthetic texts

Similar texts have simhashes that differ in few bits (Charikar, STOC 2002). A chunk of texts is hashed as one array of
code points, without a loop over texts or words. Each core hashes chunks in a thread of its own, because numpy releases
Python's lock. A million texts take a minute on two cores (docs/results/data.md).
"""

import collections
import concurrent.futures
import functools
import itertools
import os
import re
import resource
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from core.files import cli
from core.flags import Parser, at_least

CHUNK = 1 << 18  # characters hashed at a time: their arrays fit the processor's cache
# A token is a Chinese, Japanese or Korean character, or a word of another script. Signs that change the meaning are
# tokens too ("3 + 5" is not "3 - 5"): Unicode's mathematical signs, currencies, other symbols, and _SIGNS. Punctuation
# is ignored.
_ALONE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")
_SIGNS = "-*/^%#@&_{}[]()"
PAD = np.uint64(0x9E3779B97F4A7C15)
BASE = np.uint64(0xD6E8FEB86659FD93)  # base of the rolling hashes; odd, so multiplication by it is invertible
_LANES = np.uint64(0x0101010101010101)


def mix_bits(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every input bit over all output bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def character_kinds() -> np.ndarray:
    """-> (0x110000,) uint8: the kind of each code point.

    0: ignored, 1: part of a word, 2: a token by itself, 3: a sign, which is a token too.
    """
    table = np.zeros(0x110000, np.uint8)
    table[:0x40000] = [  # no letters above this code point
        2 if _ALONE.match(c) else 3 if unicodedata.category(c) in ("Sm", "Sc", "So") or c in _SIGNS else c.isalnum()
        for c in map(chr, range(0x40000))
    ]
    return table


def sign_hashes() -> np.ndarray:
    """Hashes of all tokens that consist of one sign."""
    return mix_bits(np.append(np.flatnonzero(character_kinds() == 3), ord("!")).astype(np.uint64) * BASE)


def token_hashes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes all W tokens of N texts -> hashes (W,) uint64, counts (N,): number of tokens per text.

    A text that is only punctuation is one token. "!" after a digit is a sign (factorial). A sign repeated more than twice
    counts twice, because the length of a blank ("____") or a ruler has no meaning.
    """
    # one string for all texts; NUL separates them, since it combines with no other character
    joined = unicodedata.normalize("NFKC", "".join(text.replace("\0", " ") + "\0" for text in texts)).lower()
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kind = character_kinds()[points]
    after_digit = points[:-1] - np.uint32(ord("0")) < 10  # uint32: the difference of a character below "0" wraps around
    kind[1:][(points[1:] == ord("!")) & after_digit] = 3
    kind[2:][(kind[2:] == 3) & (points[2:] == points[1:-1]) & (points[1:-1] == points[:-2])] = 0
    ends = np.flatnonzero(points == 0)  # (N,)
    begins = np.concatenate(([0], ends[:-1] + 1))
    counts = np.add.reduceat(kind != 0, begins, dtype=np.int64) if len(texts) else ends
    for i in np.flatnonzero(counts == 0):  # few
        kind[begins[i] : ends[i]] = 1
    first = kind >= 2
    first[1:] |= (kind[1:] == 1) & (kind[:-1] != 1)
    first[:1] |= kind[:1] == 1
    starts = np.flatnonzero(first)
    at = np.arange(len(points))
    within = at - np.maximum.accumulate(np.where(first, at, 0))  # position inside the token
    longest = int(within[kind != 0].max(initial=0))
    powers = np.cumprod(np.full(longest + 1, BASE, np.uint64), dtype=np.uint64)
    letters = points * powers[np.minimum(within, longest)] * (kind != 0)
    hashes = mix_bits(np.add.reduceat(letters, starts)) if len(starts) else np.empty(0, np.uint64)
    return hashes, np.diff(np.searchsorted(starts, ends), prepend=0)


def hash_ngrams(hashes: np.ndarray, counts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes all G n-grams of tokens -> hashes (G,) uint64, starts (N,): index of each text's first n-gram.

    A text of fewer than n tokens has one n-gram, padded with PAD. hashes, counts: from token_hashes().
    """
    lengths = np.maximum(counts, n)
    if (counts < n).any():
        flat = np.full(lengths.sum(), PAD)
        shift = np.repeat(np.cumsum(lengths - counts) - (lengths - counts), counts)
        flat[np.arange(len(hashes)) + shift] = hashes
    else:
        flat = hashes
    total = max(len(flat) - n + 1, 0)
    h = np.zeros(total, np.uint64)
    for k in range(n):
        h = h * BASE + flat[k : k + total]
    inside = np.ones(total, bool)  # False for n-grams that cross into the next text
    ends = np.cumsum(lengths)
    for k in range(1, n):
        inside[ends[:-1] - k] = False
    return mix_bits(h[inside]), np.concatenate(([0], np.cumsum(lengths - n + 1)[:-1]))


def ngram_hashes(texts: list[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    return hash_ngrams(*token_hashes(texts), n)


def majority_bits(h: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Takes the majority of each bit over runs of hashes. h (G,) uint64, runs begin at `starts` (N,) -> (N,) uint64.

    Counts eight bits at once, one in each byte of a 64-bit word. A byte counts to 255, so longer runs are counted in
    pieces.
    """
    grams = np.diff(np.append(starts, len(h)))
    pieces = -(-grams // 255)
    first = np.concatenate(([0], np.cumsum(pieces)[:-1]))
    cuts = np.repeat(starts - 255 * first, pieces) + 255 * np.arange(pieces.sum())
    out = np.zeros(len(starts), np.uint64)
    for bit in range(8):
        lanes = np.add.reduceat((h >> np.uint64(bit)) & _LANES, cuts)  # (pieces,)
        ones = np.add.reduceat(lanes.view(np.uint8).reshape(-1, 8), first, axis=0, dtype=np.int64)  # (N, 8)
        most = (2 * ones > grams[:, None]).astype(np.uint8)
        out |= most.view(np.uint64)[:, 0] << np.uint64(bit)
    return out


def text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields lists of texts of at most CHUNK characters in total. A longer text gets a list of its own."""
    batch, size = [], 0
    for text in texts:
        if batch and size + len(text) > CHUNK:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def in_threads(work: Callable, items: Iterable) -> Iterator:
    """Yields work(item) for every item in order, computed on all cores. Keeps at most 2 items per core in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def simhash(texts: Iterable[str], n: int = 3) -> np.ndarray:
    """Simhashes of N texts -> (N,) uint64. Bit b is the majority of bit b over the hashes of the text's n-grams."""
    parts = in_threads(lambda chunk: majority_bits(*ngram_hashes(chunk, n)), text_batches(texts))
    return np.concatenate([np.empty(0, np.uint64), *parts])


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n (Li et al., arXiv 1510.03055): number of different n-grams / number of n-grams."""
    parts = [ngram_hashes(chunk, n)[0] for chunk in text_batches(texts)]
    grams = np.concatenate([np.empty(0, np.uint64), *parts])
    return len(np.unique(grams)) / max(len(grams), 1)


def near_pairs(hashes: np.ndarray, hamming: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds all pairs i < j of hashes (N,) uint64 that differ in at most `hamming` bits -> i (P,), j (P,). Exact.

    Cuts the 64 bits into hamming + r blocks. Two hashes within the distance agree on at least r whole blocks. Each
    choice of r blocks is the key of one table, so such hashes share a bucket in at least one table. r grows with N:
    longer keys keep the buckets small and the work near N log N.
    """
    n, r = len(hashes), 1
    while hamming and 2 ** (64 * r // (hamming + r)) * 8 < n and r < 4:
        r += 1
    edges = [64 * b // (hamming + r) for b in range(hamming + r + 1)]
    blocks = [((1 << (hi - lo)) - 1) << lo for lo, hi in itertools.pairwise(edges)]
    found = [np.empty(0, np.int64)]
    for choice in itertools.combinations(blocks, r):
        key = hashes & np.uint64(sum(choice))
        order = np.argsort(key, kind="stable")
        key = key[order]
        at = np.arange(n - 1) if n else np.empty(0, np.int64)
        for step in range(1, n):  # compare members `step` apart, in all buckets at once
            at = at[at + step < n]
            at = at[key[at] == key[at + step]]
            if not len(at):
                break
            i, j = order[at], order[at + step]
            x = hashes[i] ^ hashes[j]
            for _ in range(hamming):
                x &= x - np.uint64(1)  # clears the lowest set bit; 0 stays 0
            close = x == 0
            i, j = i[close], j[close]
            found.append(np.minimum(i, j) * n + np.maximum(i, j))
    pairs = np.unique(np.concatenate(found))
    return pairs // max(n, 1), pairs % max(n, 1)


def keep_best(hashes: np.ndarray, rank: np.ndarray, hamming: int) -> tuple[np.ndarray, np.ndarray]:
    """Visits texts from best to worst and drops each text that is near a kept one.

    rank: (N,), lower is better, no ties. -> keep (N,) bool; twin (N,): index of the kept near duplicate, its own
    if kept.
    """
    order = np.argsort(rank)
    values, first, group = np.unique(hashes[order], return_index=True, return_inverse=True)
    best = order[first]  # the best text of each group of equal hashes
    i, j = near_pairs(values, hamming)
    source, target = np.concatenate((i, j)), np.concatenate((j, i))
    by_source = np.argsort(source, kind="stable")
    source, target = source[by_source], target[by_source]
    begin = np.searchsorted(source, np.arange(len(values) + 1))  # v's neighbours: target[begin[v] : begin[v + 1]]
    stays_for = np.arange(len(values))  # index of the kept text
    undecided = np.ones(len(values), bool)
    paired = np.unique(source)
    for v in paired[np.argsort(first[paired])]:  # texts with near neighbours, best first
        if undecided[v]:
            near = target[begin[v] : begin[v + 1]]
            near = near[undecided[near]]
            stays_for[near] = v
            undecided[near] = undecided[v] = False
    twin = np.empty(len(hashes), np.int64)
    twin[order] = best[stays_for[group]]
    return twin == np.arange(len(hashes)), twin


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def synthetic_texts(n: int) -> Iterator[str]:
    """Yields n texts of about 300 characters, alternately English and Chinese.

    Every tenth text is a changed copy of the fourth or fifth text of its ten: in upper case with a "!", with a word
    added at the end, or with a word added in the middle.
    """
    rng, ten = np.random.default_rng(0), []
    words = np.array(["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(2, 9, 20_000)])
    for i in range(n):
        draw = (20_000 * rng.random(300) ** 2).astype("<u4")  # some are common, most are rare
        if i % 10 == 9:
            text, ten = ten[4 - i // 10 % 2], []
            changed = text.upper() + "!", f"{text} 完", f"{text[:150]} 中 {text[150:]}"
            yield changed[i // 20 % 3]
            continue
        english = i % 2 == 0
        text = " ".join(words[draw[:90]].tolist())[:300] if english else (draw + 0x4E00).tobytes().decode("utf-32-le")
        ten.append(text)
        yield text


def main() -> None:
    p = Parser(description="Measures time, memory and recall of deduplication on synthetic texts.")
    p.add_argument("n", type=at_least(10), help="number of texts, of 300 characters each")
    n = p.parse_args().n
    begun, making = time.perf_counter(), [0.0]

    def texts() -> Iterator[str]:
        before = time.thread_time()
        for text in synthetic_texts(n):
            making[0] += time.thread_time() - before
            yield text
            before = time.thread_time()

    hashes = simhash(texts())
    hashed = time.perf_counter()
    keep, _ = keep_best(hashes, np.arange(n), 3)
    ended = time.perf_counter()
    changed = np.arange(9, n, 10)
    origin = changed - 5 - changed // 10 % 2
    near = np.unpackbits((hashes[changed] ^ hashes[origin]).view(np.uint8)).reshape(-1, 64).sum(1) <= 3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{n:,} texts: {ended - begun:.1f} s ({hashed - begun:.1f} s simhashes, {ended - hashed:.1f} s pairs), "
        f"{time.process_time():.1f} s CPU, including {making[0]:.1f} s to make the texts; peak {peak:.2f} GiB"
    )
    print(
        f"{len(changed):,} changed copies, {near.sum():,} within 3 bits of their original; "
        f"{n - keep.sum():,} texts dropped, {(keep[changed] & keep[origin])[near].sum()} near pairs left"
    )


if __name__ == "__main__":
    cli(main)
