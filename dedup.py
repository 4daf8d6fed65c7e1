"""Near duplicates by simhash, and evaluation questions by shared n-grams, in numpy on arrays of 64-bit hashes.

    hashes = simhash(texts)                          # (N,) uint64; alike texts differ in few bits (Charikar, STOC 2002)
    keep, twin = keep_best(hashes, rank, hamming=3)  # of every group of near duplicates the one of the best rank
"""

import hashlib
import itertools
import re
import unicodedata

import numpy as np

CHUNK = 4096  # texts hashed at a time: bounds the memory of the bit counts
# A Chinese, Japanese or Korean character is a token by itself; elsewhere a word is. Signs that change what is asked are
# tokens too ("3 + 5" is not "3 - 5"), other punctuation is not.
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]+"
    r"|[-+*/×÷=<>^%$#@&|~_{}\[\]()]"
)
_PAD = np.uint64(0x9E3779B97F4A7C15)


def tokens(text):
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def mix(x):
    """A bijection of uint64 that spreads every input bit over all output bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ngram_hashes(texts, n, memo):
    """All n-grams of tokens of all texts: (hashes (G,) uint64, starts (N,) where each text's begin). A text of fewer than n
    tokens has one, of all its tokens and padding. memo: a dict kept between calls, token -> hash."""
    flat, lengths = [], []
    for text in texts:
        words = tokens(text) or [text]
        for word in words:
            if word not in memo:
                digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
                memo[word] = int.from_bytes(digest, "little")
        flat += [memo[word] for word in words]
        flat += [int(_PAD)] * (n - len(words))
        lengths.append(max(len(words), n))
    if len(memo) > 2_000_000:
        memo.clear()
    flat, lengths = np.array(flat, np.uint64), np.array(lengths, np.int64)
    windows = len(flat) - n + 1
    h = np.zeros(windows, np.uint64)
    for k in range(n):
        h = mix(h + flat[k : k + windows] + _PAD)
    ends = np.repeat(np.cumsum(lengths), lengths)[:windows]
    inside = np.arange(windows) + n <= ends  # the window does not run into the next text
    starts = np.concatenate(([0], np.cumsum(lengths - n + 1)[:-1]))
    return h[inside], starts


def chunks(items, size):
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def simhash(texts, n=3):
    """texts: an iterable -> (N,) uint64. Bit b is what most of the text's n-gram hashes have there."""
    out, memo = [np.empty(0, np.uint64)], {}
    for chunk in chunks(texts, CHUNK):
        h, starts = ngram_hashes(chunk, n, memo)
        bits = np.unpackbits(h.view(np.uint8).reshape(-1, 8), axis=1)  # (G, 64)
        ones = np.add.reduceat(bits, starts, axis=0, dtype=np.int32)  # (N, 64)
        grams = np.diff(np.append(starts, len(h)))
        out.append(np.packbits(2 * ones > grams[:, None], axis=1).view(np.uint64)[:, 0])
    return np.concatenate(out)


def near_pairs(hashes, hamming):
    """All pairs i < j of hashes (N,) uint64 that differ in at most `hamming` bits, exactly: (P,), (P,).

    The 64 bits are cut into hamming + r blocks. Two hashes within the distance agree on at least r whole blocks, so they
    meet in one of the tables keyed by every choice of r blocks. r = 1 for small N; more, and so longer keys, where the
    buckets would fill up: the work stays near N log N."""
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
        for step in range(1, n):  # every bucket's members `step` apart, all buckets at once
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


def keep_best(hashes, rank, hamming):
    """rank: (N,), lower is better, no ties. Goes through the texts from the best on and drops what is near one kept before:
    no two that stay are near, and each that goes is near one that stays. -> keep (N,) bool, twin (N,): the index of the
    one that stays in its place (its own where it stays)."""
    order = np.argsort(rank)
    values, first, group = np.unique(hashes[order], return_index=True, return_inverse=True)
    best = order[first]  # of equal hashes the best text
    i, j = near_pairs(values, hamming)
    source, target = np.concatenate((i, j)), np.concatenate((j, i))
    by = np.argsort(source, kind="stable")
    source, target = source[by], target[by]
    begin = np.searchsorted(source, np.arange(len(values) + 1))
    stays_for = np.full(len(values), -1)
    for v in np.argsort(first):  # from the best on
        if stays_for[v] < 0:
            stays_for[v] = v
            near = target[begin[v] : begin[v + 1]]
            stays_for[near[stays_for[near] < 0]] = v
    twin = np.empty(len(hashes), np.int64)
    twin[order] = best[stays_for[group]]
    return twin == np.arange(len(hashes)), twin


def ngram_set(texts, n=13):
    """The sorted n-gram hashes of all texts; a text shorter than n tokens counts as a whole."""
    memo = {}
    parts = [ngram_hashes(chunk, n, memo)[0] for chunk in chunks(texts, CHUNK)]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))


def shares_ngram(texts, grams, n=13):
    """-> (N,) bool: the text shares an n-gram with the set, or, being shorter than n tokens, is one of its short texts."""
    out, memo = [np.empty(0, bool)], {}
    for chunk in chunks(texts, CHUNK):
        h, starts = ngram_hashes(chunk, n, memo)
        at = np.searchsorted(grams, h).clip(max=max(len(grams) - 1, 0))
        hit = grams[at] == h if len(grams) else np.zeros(len(h), bool)
        out.append(np.logical_or.reduceat(hit, starts))
    return np.concatenate(out)
