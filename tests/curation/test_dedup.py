"""dedup.py against brute force and against hashing in plain Python, one text and one word at a time."""

import collections
import re
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import contamination, dedup

# ---- the hashes, by a second and slower hand

WHOLE = 2**64
SIGN = "".join(
    c
    for c in map(chr, range(sys.maxunicode))
    if unicodedata.category(c) in ("Sm", "Sc", "So") or c in "-*/^%#@&_{}[]()"
)
SIGN = f"[{re.escape(SIGN)}]"
TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]+"
    rf"|{SIGN}|(?<=[0-9])!"
)


def slow_mix(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WHOLE
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WHOLE
    return x ^ x >> 31


def slow_grams(text, n):
    base, pad = int(dedup.BASE), int(dedup.PAD)
    text = unicodedata.normalize("NFKC", text.replace("\0", " ")).lower()
    text = re.sub(rf"({SIGN})\1{{2,}}", r"\1\1", text)
    tokens = TOKEN.findall(text) or [text] * bool(text)
    hashes = [slow_mix(sum(ord(c) * pow(base, k + 1, WHOLE) for k, c in enumerate(token)) % WHOLE) for token in tokens]
    hashes += [pad] * (n - len(hashes))
    return [
        slow_mix(sum(h * pow(base, n - 1 - k, WHOLE) for k, h in enumerate(hashes[i : i + n])) % WHOLE)
        for i in range(len(hashes) - n + 1)
    ]


def slow_simhash(text, n=3):
    grams = slow_grams(text, n)
    return sum(1 << b for b in range(64) if 2 * sum(g >> b & 1 for g in grams) > len(grams))


TEXTS = st.text(
    st.one_of(st.characters(), st.sampled_from("ab 9_+-.,!≤√∩€😀Σİﬁé\u0301\u3000你好的一カ한\0\n")), max_size=40
)


@settings(max_examples=150)
@given(st.lists(TEXTS, max_size=6), st.integers(1, 5))
def test_hashes_equal_those_of_plain_python(texts, n):
    h, starts = dedup.ngram_hashes(texts, n)
    assert [part.tolist() for part in np.split(h, starts[1:])] == [slow_grams(t, n) for t in texts] or not texts
    assert dedup.simhash(texts, n).tolist() == [slow_simhash(t, n) for t in texts]


def test_long_texts_and_many_batches(monkeypatch):
    """Runs of more grams than a byte counts to, and chunks that end anywhere."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, 50, size)) for size in (3, 254, 255, 256, 257, 258, 511, 1300)]
    texts += ["".join(chr(0x4E00 + c) for c in rng.integers(0, 99, 700))]
    want = [slow_simhash(t) for t in texts]
    assert dedup.simhash(texts).tolist() == want
    monkeypatch.setattr(dedup, "CHUNK", 300)
    assert dedup.simhash(texts * 5).tolist() == want * 5


@pytest.mark.parametrize(
    "alphabet",
    [
        "the a of lamp river stone green walks slowly under old new bridge".split(),
        list("春夏秋冬山水花鸟风月天地人你我他"),
    ],
)
def test_near_texts_equal_brute_force(alphabet):
    """From texts to pairs: a sample with its edits, against every pair's distance of the slow hashes."""
    rng = np.random.default_rng(1)
    words = [
        alphabet[i] + str(k) if alphabet[0].isascii() else alphabet[i] for k in range(4) for i in range(len(alphabet))
    ]
    texts = []
    for _ in range(60):
        one = rng.choice(words, 60).tolist()
        texts.append((" " if alphabet[0].isascii() else "").join(one))
        for _ in range(2):
            one[int(rng.integers(60))] = str(rng.choice(words))
            texts.append((" " if alphabet[0].isascii() else "").join(one))
    slow = [slow_simhash(t) for t in texts]
    want = {
        (i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)) if bin(slow[i] ^ slow[j]).count("1") <= 3
    }
    i, j = dedup.near_pairs(dedup.simhash(texts), 3)
    assert set(zip(i.tolist(), j.tolist())) == want and len(want) > 5


# ---- pairs


def brute_pairs(hashes, d):
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).astype(np.int16)
    near = (bits[:, None, :] != bits[None, :, :]).sum(-1) <= d
    return {(i, j) for i, j in np.argwhere(near).tolist() if i < j}


def flip(rng, h, k):
    return h ^ np.uint64(sum(1 << int(b) for b in rng.choice(64, k, replace=False)))


@pytest.mark.parametrize("d", [0, 1, 2, 3, 4, 7])
def test_near_pairs_equal_brute_force(d):
    rng = np.random.default_rng(d)
    base = rng.integers(0, 2**64, 200, dtype=np.uint64)
    near = [flip(rng, base[i], k) for k in range(1, 9) for i in rng.choice(200, 25, replace=False)]
    hashes = np.concatenate([base, np.array(near, np.uint64), base[:20]])  # equal ones too
    i, j = dedup.near_pairs(hashes, d)
    pairs = list(zip(i.tolist(), j.tolist()))
    want = brute_pairs(hashes, d)
    assert len(pairs) == len(set(pairs)) and set(pairs) == want
    assert len(want) > (19 if d == 0 else 40), "the planted neighbours are there to be found"


def test_near_pairs_with_longer_keys_equal_brute_force():
    """Enough hashes that keys of one block would fill their buckets: the tables of several blocks are used."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 2500, dtype=np.uint64)
    hashes[1500:] = [flip(rng, hashes[i % 1500], 1 + i % 9) for i in range(1000)]
    assert 2 ** (64 // 8) * 8 < len(hashes), "7 + 1 blocks of 8 bits would not do"
    i, j = dedup.near_pairs(hashes, 7)
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).astype(np.float32) * 2 - 1
    distance = (64 - bits @ bits.T) / 2
    assert set(zip(i.tolist(), j.tolist())) == {(a, b) for a, b in np.argwhere(distance <= 7).tolist() if a < b}


def test_near_pairs_of_few_hashes():
    for n in (0, 1, 2):
        i, j = dedup.near_pairs(np.zeros(n, np.uint64), 3)
        assert list(zip(i, j)) == [(0, 1)] * (n == 2)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 4))
def test_keep_best_keeps_a_maximal_independent_set_of_the_best(seed, d):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 20, dtype=np.uint64)
    hashes = np.array([flip(rng, hashes[i % 20], int(rng.integers(0, 4))) for i in range(80)], np.uint64)
    rank = rng.permutation(80)
    keep, twin = dedup.keep_best(hashes, rank, d)
    pairs = brute_pairs(hashes, d)
    assert not any(keep[i] and keep[j] for i, j in pairs), "no two that stay are near"
    for i in np.flatnonzero(~keep).tolist():
        t = int(twin[i])
        assert keep[t] and (min(i, t), max(i, t)) in pairs and rank[t] < rank[i], (
            "what goes is near a better one that stays"
        )
    assert (twin[keep] == np.flatnonzero(keep)).all()


def test_simhash_by_hand_and_its_locality():
    # one 3-gram: the simhash is that gram's hash, whatever stands between the words
    a, b, c = dedup.simhash(["One two three", "one, TWO; three!", "one two four"])
    assert a == b != c
    assert a == dedup.ngram_hashes(["one two three"], 3)[0][0]
    # three grams: the majority of their bits
    g = dedup.ngram_hashes(["a b c d e"], 3)[0]
    assert dedup.simhash(["a b c d e"])[0] == (g[0] & g[1]) | (g[0] & g[2]) | (g[1] & g[2])
    # not the chunking
    texts = [f"text number {i} of the list" for i in range(10)]
    assert (dedup.simhash(texts) == np.concatenate([dedup.simhash([t]) for t in texts])).all()
    long = " ".join(f"word{i}" for i in range(200))
    x, y, z = dedup.simhash([long, long + " end", " ".join(f"other{i}" for i in range(200))])
    distance = lambda p, q: bin(int(p) ^ int(q)).count("1")
    assert distance(x, y) <= 6 < 20 < distance(x, z)
    x, y, z = dedup.simhash(
        [
            "今天天气很好我们一起去公园散步吧顺便买一些水果回来",
            "今天天气很好！我们一起去公园散步吧，顺便买一些水果回来。",
            "机器学习是人工智能的一个分支",
        ]
    )
    assert x == y and distance(x, z) > 10
    p, q, r, s = dedup.simhash(["3 + 5", "3 - 5", "!!!", "???"])
    assert len({p, q, r, s}) == 4, "signs count, and texts of nothing but signs are not all alike"


@pytest.mark.parametrize("one, other", [
    ("2x + 3 ≤ 7", "2x + 3 ≥ 7"), ("√2", "2"), ("A ∩ B", "A ∪ B"), ("Explain 😀", "Explain 😢"), ("5 €", "5 £"), ("5! / 3!", "5 / 3!"),
])  # fmt: skip
def test_signs_that_change_the_meaning_are_told_apart(one, other):
    a, b, c = dedup.simhash([one, other, f"“{one}”…"])
    assert a != b and a == c
    assert held([f"What is {one}?"], [f"What is {one} ?", f"What is {other}"]) == [0] and held([one, other], [one]) == [
        0,
        -1,
    ]


def held(texts, questions):
    return contamination.simhash_and_match(texts, contamination.build_index(questions))[1].tolist()


def test_a_shared_run_of_13_tokens_is_found():
    question = "If a train travels sixty miles in one hour how far does it travel in three hours"
    chinese = "下列关于税法基本原则的表述中不正确的是哪一个"
    words = question.split()
    texts = [
        question.upper() + "!",
        "Please: " + " ".join(words[2:15]),
        " ".join(words[:12]),
        "请问下列关于税法基本原则的表述中不正确",
        "something else entirely",
    ]
    assert held(texts, ["What is two plus two?", question, "?", chinese]) == [1, 1, -1, 3, -1]
    assert held(texts, []) == held(texts, [""]) == [-1] * 5 and held([], [question]) == []
    assert held([f"{chinese}？", "a"], iter([chinese] * 3)) == [0, -1], "of equal questions the first"


def test_a_text_that_contains_a_short_question_is_found():
    five, four = "What is two plus two?", "Who was Ada Lovelace?"
    assert held(
        [
            "what is TWO plus two",
            "Q: what is two plus two? A:",
            "Tell me now: what is two plus two, my friend",
            "what is two plus three",
            "Tell me now, please: what is two plus two, my friend",
        ],
        [five],
    ) == [0, 0, 0, -1, -1]  # at most as many others
    assert held(["who was ada lovelace", "so who was ada lovelace"], [four]) == [0, -1], (
        "beside four tokens there may be no other"
    )
    twelve = " ".join(f"w{i}" for i in range(12))
    assert held(
        [twelve, f"{twelve} x", f"x {twelve} " + "y " * 11, f"x {twelve} " + "y " * 12, "w1 " + twelve[3:]], [twelve]
    ) == [0, 0, 0, -1, -1]
    sums = "((-1 + 2 + 9 * 5) - (-2 + -4 + -4 * -7)) ="  # 26 tokens, none of which tells
    assert held(
        [f"Please answer this question: {sums}", sums, f"{'x ' * 12}{sums}", f"{'x ' * 13}{sums}", sums[2:]], [sums]
    ) == [0, 0, 0, -1, -1]


def test_a_question_with_one_word_changed_is_found():
    question = "What happens if you crack your knuckles a lot?"
    texts = [
        "What really happens if you crack your knuckles a lot?",
        "What happens if you crack knuckles a lot",
        "What happens if you crack knuckles very a lot",
        "What 2 happens if you crack your knuckles a lot",
        "What happens if you crack your knuckles lot",
        "What truly really happens if you crack your knuckles a lot",
        "What happens if you crack",
    ]
    assert held(texts, [question]) == [0, 0, -1, -1, -1, -1, -1], "neither another word nor a number nor two"
    words = [f"w{i}" for i in range(26)]
    for n, found in ((4, -1), (5, 0), (12, 0), (25, 0), (26, 0)):  # 26: a run of 13 stays whatever is changed
        for i in range(1, n - 1):
            assert (
                held(
                    [" ".join([*words[:i], "more", *words[i:n]]), " ".join(words[:i] + words[i + 1 : n])],
                    [" ".join(words[:n])],
                )
                == [found] * 2
            )


TOKENS = st.lists(st.sampled_from([*(f"w{i}" for i in range(9)), "1", "a"]), min_size=1, max_size=30)


@settings(max_examples=100)
@given(st.lists(TOKENS, min_size=1, max_size=5), st.lists(TOKENS, min_size=1, max_size=5), st.integers(0, 20))
def test_matches_equal_those_of_plain_python(texts, questions, at):
    def runs(tokens, k):
        return {tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)}

    def shares(t, q):
        telling = {run for run in runs(q, 13) if len(set(run) - {"1", "a"}) >= 9}
        if telling:
            return bool(runs(t, 13) & telling)
        k = len(q)
        return tuple(q) in runs(t, k) and len(t) - k <= (min(k, 12) if k >= 5 else 0)

    def one_off(t, q):
        t, q = collections.Counter(t), collections.Counter(q)
        return (
            5 <= q.total() <= 25
            and ((t - q).total(), (q - t).total()) in ((0, 1), (1, 0))
            and not {"1", "a"} & {*(t - q), *(q - t)}
        )

    texts = [
        *texts,
        questions[0],
        [*texts[0], *questions[-1][at:]],
        [f"w{i % 9}" for i in range(at)],
        questions[0][:at] + questions[0][at + 1 :],
        [*questions[0][:at], texts[0][0], *questions[0][at:]],
    ]
    questions = [*questions, [f"w{i % 9}" for i in range(13)]]
    want = [[i for i, q in enumerate(questions) if shares(t, q) or one_off(t, q)] for t in texts]
    got = held([" ".join(t) for t in texts], [" ".join(q) for q in questions])
    assert all(g in w if w else g == -1 for g, w in zip(got, want)) and any(want)


def test_uninformative_runs_are_ignored():
    """A blank, a table's rule, a type signature, options, a matrix: thirteen tokens that many texts share by chance."""
    ruler, signature = (
        "| name | age |\n|---|---|---|---|---|",
        "def f(xs: List[int]) -> List[int]: return [x for x in (xs)]",
    )
    questions = [
        f"Fill in the table with what you know of these people please now {ruler}",
        signature,
        "He went ______________ yesterday",
    ]
    texts = [
        f"Another table of other things {ruler}",
        "def g(xs: List[int]) -> List[int]: return []",
        "Complete: ________________",
        questions[0],
    ]
    assert held(texts, questions) == [-1, -1, -1, 0]
    options, matrix = "(A) 1 (B) 2 (C) 3 (D) 4 (E) 5", "[[1, 2, 3], [4, 5, 6], [7, 8, 9]]"
    java = "public class Main { public static void main(String[] args) {"
    questions = [
        f"How many of the penguins in the table are older than {options}",
        f"grid = {matrix}",
        f"Why is this slow? {java}",
        matrix,
    ]
    texts = [f"Half of ten is {options}", f"Transpose {matrix}", f"Fix it: {java}", matrix]
    assert held(texts, questions[:3]) == [-1] * 4 and held(texts, questions) == [-1, 3, -1, 3], (
        "a whole question in few other words is one"
    )
    a, b, c, d = dedup.simhash(["Fill: ____ is red", "Fill: __________ is red", "2 ** 3 = ?", "2 * 3 = ?"])
    assert a == b and c != d, "a blank's length says nothing, two stars do"


def test_distinct_by_hand():
    assert dedup.distinct(["a b a b", "a b"], 1) == 2 / 6
    assert dedup.distinct(["a b a b", "a b"], 2) == 2 / 4  # ab ba ab, ab
    assert dedup.distinct(["你好你好"], 2) == 2 / 3 and dedup.distinct([], 2) == 0
