"""verify.py: what is read out of a reply."""

import random
import time

import pytest

from verification import answers
from verification.answers import (
    check_reply,
    extract_choice,
    extract_code,
    extract_program,
    last_number,
    numbers_equal,
    verify,
)

# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 4", 4),
        ("She makes $1,234.50.", 1234.5),
        ("so 12,345,678 in all", 12345678),
        ("it grew by 25%", 25),
        ("the change is -7.", -7),
        ("+3", 3),
        ("x = .5", 0.5),
        ("0.25", 0.25),
        ("一共是 18 元。", 18),
        ("答案是42个苹果", 42),
        ("3 + 4 = 7\n#### 72", 72),
        ("First 5, then 6.", 6),
        ("1,23", 23),  # no thousands: a list
        ("12,3456", 3456),
        ("007", 7),
        ("10-12", -12),  # the sign touches the number
        ("2.", 2),
        ("no digits", None),
        ("", None),
        ("-", None),
        ("١٢", None),  # only ASCII digits are read
    ],
)
def test_last_number(text, value):
    assert last_number(text) == value


def test_numbers_equal_is_absolute():
    assert numbers_equal(72.0, 72.00009) and not numbers_equal(72.0, 72.0002)
    assert not numbers_equal(1e9, 1e9 + 1)
    assert not numbers_equal(None, None) and not numbers_equal(None, 0.0)


# ---------------------------------------------------------------- choices

FRUIT = {"A": "an apple", "B": "a pear", "C": "a plum and a pear", "D": "none"}
CITY = {"A": "北京", "B": "上海", "C": "广州", "D": "深圳"}


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("C.", "C"),
        ("(D) none of them", "D"),
        ("D. none", "D"),
        ("The answer is B.", "B"),
        ("The correct answer is: C", "C"),
        ("Answer: D", "D"),
        ("I would choose C here, not B.", "C"),
        ("A is tempting, but the answer is D.", "D"),  # a statement goes before the first letter
        ("The answer is not A. B is correct.", "B"),
        ("C is not correct. D is correct.", "D"),
        ("B is right because A grows on trees", "B"),
        ("The best choice would be C", "C"),
        ("a plum and a pear", "C"),  # the longest text first: "a pear" is part of it
        ("It must be a pear.", "B"),
        ("IT IS AN APPLE", "A"),  # case does not matter
        ("The answer is an apple", "A"),
        ("f(x)=D=3, so (C)", "C"),  # a letter before = is a variable
        ("**B**", "B"),
        ("Plums", "C"),  # nothing but similarity
    ],
)
def test_choice_english(reply, letter):
    assert extract_choice(reply, FRUIT) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("答案是B", "B"),
        ("正确答案是：C。", "C"),
        ("【答案】D", "D"),
        ("A不对，应该选D。", "D"),
        ("选择：C", "C"),
        ("A选项错误，所以答案为B。", "B"),
        ("答案不是A，B选项正确", "B"),
        ("A项不正确，C项正确", "C"),
        ("B符合题意", "B"),
        ("（C）广州", "C"),
        ("广州", "C"),
        ("我认为是深圳。", "D"),
        ("上海市", "B"),
    ],
)
def test_choice_chinese(reply, letter):
    assert extract_choice(reply, CITY) == letter
    assert extract_choice(reply, CITY, question="中国的首都是____。") == letter


def test_choice_stem_of_the_question():
    """A reply that repeats the stem of a C-Eval question is a statement of the answer."""
    choices = {"A": "既不可靠", "B": "可靠", "C": "有序", "D": "既可靠也有序"}
    question = "关于传输层的面向连接服务的特性是____。"
    reply = "A、B都提到了。关于传输层的面向连接服务的特性是既可靠也有序"
    assert extract_choice(reply, choices, question) == "D"
    assert extract_choice(reply, choices) == "A"
    # by case there: the unit of choice B is not the letter n of the reply
    assert extract_choice("由 n 可知选C。", {"A": "1", "B": "N", "C": "2", "D": "3"}, "单位是什么的问题____。") == "C"


def test_choice_other_letters_and_odd_texts():
    five = {letter: f"text {letter.lower()}" for letter in "ABCDE"}
    assert extract_choice("The answer is E.", five) == "E"
    assert extract_choice("The answer is (B)", {"A": ".", "B": "", "C": "(.*", "D": "[x"}) == "B"
    assert extract_choice("", FRUIT) in FRUIT
    assert extract_choice("nothing to go by", FRUIT) in FRUIT


@pytest.mark.parametrize(
    ("a", "b", "score"),  # thefuzz's WRatio, by rapidfuzz 3.14
    [
        ("Plums", "a plum and a pear", 0.76),
        ("the mortgage is void", "the mortgage was void", 0.9268),
        ("Not wrong, Wrong", "Wrong, Not wrong", 0.95),
        ("wrong, quite wrong", "Wrong", 0.9),
        ("because the lien was void from the start, the buyer lost", "mortgage invalid", 0.3937),
        ("资本主义的生产过程", "价值形成过程", 0.45),
        ("ab_cd", "AB cd", 1.0),
        ("red blue green", "green teal red", 0.7464),
        ("xyzab " * 20, "abxyz", 0.48),
        ("", "x", 0.0),
    ],
)
def test_similarity(a, b, score):
    assert answers.similarity(a, b) == pytest.approx(score, abs=5e-5)
    assert answers.similarity(b, a) == pytest.approx(score, abs=5e-5)


def test_best_partial_ratio_tries_every_window():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randint(1, n))) for n in (6, 25))
        a, b = sorted((a, b), key=len)
        pieces = {b[max(0, i) : i + len(a)] for i in range(1 - len(a), len(b))} - {""}
        assert answers.best_partial_ratio(a, b) == max(answers.lcs_ratio(a, p) for p in pieces)


def test_nearest_choice():
    choices = {"A": "Wrong, Not wrong", "B": "Not wrong, Not wrong", "C": "the mortgage is void", "D": "42 apples"}
    assert answers.nearest_choice("because the mortgage was void from the start", choices) == "C"
    assert answers.nearest_choice("..", choices) == "A"  # the first among equals
    start = time.process_time()
    answers.nearest_choice("ha " * 1000, choices)  # a degenerate reply
    assert time.process_time() - start < 10


# ---------------------------------------------------------------- code

BODY = "    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)"


def test_code_fenced():
    for fence in ("```python\n", "```Python\n", "```\n"):
        assert (
            extract_code(f"Sure!\n{fence}import os\n\ndef fib(n: int) -> int:\n{BODY}\n```\nIt works.", "fib") == BODY
        )
    # everything to the end of the block comes along, what stands before the function does not
    reply = f"```python\ndef help(x):\n    return x\n\ndef fib(n):\n{BODY}\n\nprint(fib(3))\n```\n```\nfib(2)\n```"
    assert extract_code(reply, "fib") == BODY + "\n\nprint(fib(3))"


def test_code_bare():
    assert extract_code(f"Here it is:\ndef fib(n):\n{BODY}\n\nThe function is recursive.", "fib") == BODY
    assert extract_code(f"def fib(n):\n{BODY}", "fib") == BODY
    assert extract_code(f"```python\ndef fib(n):\n{BODY}", "fib") == BODY  # cut short: no closing fence
    assert extract_code(f"def solution(n):\n{BODY}\nDone.", "fib") == BODY  # another name
    assert extract_code("def fibonacci(n):\n    return 1\ndef fib(n):\n    return 2\n", "fib") == "    return 2"
    assert extract_code("return n\n\nif n:\n", "fib") == "    return n\n\n    if n:\n"


def test_program():
    reply = "First:\n```\npip install x\n```\nthen\n```python\ndef f(x):\n    return x\n```\n"
    assert extract_program(reply, "f") == "def f(x):\n    return x"
    assert extract_program(reply) == "pip install x"
    assert extract_program("def f(x): return x", "f") == "def f(x): return x"


def test_check_reply():
    assert check_reply("number", "so it is 72.", "#### 72") is True
    assert check_reply("number", "so it is 72.", 72) is True and check_reply("number", "71", 72.5) is False
    assert check_reply("number", "nothing", 72) is False
    assert all(check_reply("number", "1", reference) is None for reference in ("none", None, True, 10**400))
    assert check_reply("choice", "B", {"letter": ["B"], "choices": FRUIT}) is None
    assert check_reply("choice", "The answer is B", {"letter": "B", "choices": FRUIT}) is True
    assert check_reply("choice", "The answer is B", {"letter": "A", "choices": FRUIT}) is False
    assert (
        check_reply("choice", "B", {"letter": "E", "choices": FRUIT}) is None
        and check_reply("choice", "B", "B") is None
    )
    assert (
        check_reply("exact", " Hello World.\n", "hello world") is True
        and check_reply("exact", "hello", "world") is False
    )
    assert check_reply("exact", "ab..", "ab") is False  # one full stop is forgiven
    code = {"tests": "assert double(4) == 8", "entry_point": "double"}
    assert check_reply("code", "```python\ndef double(x):\n    return 2 * x\n```", code) is True
    assert check_reply("code", "```python\ndef double(x):\n    return x\n```", code) is False
    form = {
        "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
        "kwargs": [{}, {"end_phrase": "the end"}],
    }
    assert check_reply("format", "So it was. The end", form) is True
    assert (
        check_reply("format", "So, it was. The end", form) is False
        and check_reply("format", "So it was.", form) is False
    )
    assert (
        check_reply("format", "", form) is False
        and check_reply("format", "x", {}) is None
        and check_reply("format", "x", "y") is None
    )
    assert check_reply("poem", "roses", "red") is None


def test_a_record_is_verified_by_its_reference():
    number = {"kind": "number", "value": "42"}
    code = {"kind": "code", "value": {"tests": "assert f(1) == 2", "entry_point": "f"}}
    assert verify(number, "so 42", run_code=False) is True and verify(number, "41", run_code=True) is False
    assert verify(None, "42", run_code=True) is None and verify({"kind": "poem", "value": 1}, "42", True) is None
    program = "def f(x):\n    return x + 1"
    assert verify(code, program, run_code=False) is None and verify(code, program, run_code=True) is True


CUBE = {"A": "24a8", "B": "4,000", "C": "3", "D": "2,000", "E": "7 1/2 sec"}


@pytest.mark.parametrize("reply, letter", [
    ("If (B) held, then ... The correct answer is \\boxed{E}.", "E"),
    ("Option A is wrong. So \\(\\boxed{\\text{D}}\\)", "D"),
    ("\\boxed{A}? No: \\boxed{(C) 3}", "C"),
    ("The original price is \\( \\boxed{2000} \\).", "D"),
    ("\\boxed{\\$2,000}", "D"),
    ("\\boxed{\\frac{1}{3}}, so the answer is A.", "A"),
    ("The answer is B.", "B"),  # no box
    ("It is \\boxed{\\frac{1}{60}}. The correct choice is (B).", "B"),  # a box that is no choice
    ("\\boxed{7\\frac{1}{2} \\text{ s}}", "E"), ("\\boxed{24a^{8}}", "A"),
    ("(A) is too small. ... Thus, the answer is (D).", "D"),  # the last statement, not the first letter
    ("Answer A) 9 yards need 12 lbs, so (B) 600. The final answer: (C).", "C"),
    ("I would not choose A. I choose (E)", "E"), ("B is correct because A is not.", "B"), ("**Answer:** B", "B"),
    ("所以应该选D，不应该选A", "D"), ("因此答案是 B。", "B"), ("C项正确", "C"),
    ("C", "C"), ("(D) 2,000", "D"), ("C. 3\n\nSince A grows.", "C"), ("7 1/2 sec.", "E"),
])  # fmt: skip
def test_a_choice_that_is_stated(reply, letter):
    assert [x for x in CUBE if check_reply("choice", reply, {"letter": x, "choices": CUBE})] == [letter]
    assert {check_reply("choice", reply, {"letter": x, "choices": CUBE}) for x in CUBE} == {True, False}


WAYS = dict(zip("ABCDE", ["8^8 ways", "8^9 ways", "7^5 ways", "8^7 ways", "8^6 ways"]))
MILES = dict(zip("ABCDE", "6 7 8 10 11".split()))


@pytest.mark.parametrize("reply, choices, verdict", [
    ("I am not sure.", MILES, None), ("Sorry, I cannot help with that.", MILES, None), ("A man walks", MILES, None),
    ("To solve this problem, we need to think step by step.", WAYS, None), ("", WAYS, None), ("The answer is A man.", MILES, None),
    ("I cannot answer. A man walks home.", MILES, None), ("The answer is A or B.", MILES, None), ("A. 6\nB. 7\nC. 8", MILES, None),
    ("The answer is 12.", MILES, None), ("A, B and C are all possible", MILES, None), ("A man", {"A": "", "B": "x"}, None),
    ("There are \\boxed{462} ways.", WAYS, False), ("The distance is \\boxed{x - 2}.", MILES, False), ("\\boxed{6}", WAYS, False),
    ("\\boxed{45}", dict(zip("AB", ["1/45", "1/42"])), False), ("\\boxed{A man}", MILES, False),
    ("\\boxed{12}", MILES | {"E": "None of these"}, None),  # which may be right
    ("\\boxed{(P/4)^2}", dict(zip("AB", ["P^2/16", "4P"])), None),  # another form of A, for all one knows
    ("\\boxed{5}", dict(zip("AB", ["5 min", "5 sec"])), None),
])  # fmt: skip
def test_unclear_choices_are_not_guessed(reply, choices, verdict):
    """A reply that says nothing would otherwise be right as often as dice are."""
    assert {check_reply("choice", reply, {"letter": x, "choices": choices}) for x in choices} == {verdict}
    assert extract_choice(reply, choices) in choices  # the evaluation's protocol always has a letter


@pytest.mark.parametrize("text, value", [
    ("$2,000", 2000), ("7 1/2 sec", 7.5), ("58\\%", 58), ("\\frac{1}{4}", 0.25), ("Rs. 5600", 5600), ("-3", -3), ("600 m", 600),
    ("2:3", None), ("8^6 ways", None), ("4p", None), ("P/16", None), ("3 hours 20 min", None), ("", None), ("1/0", None),
])  # fmt: skip
def test_quantities(text, value):
    assert answers.parse_quantity(text) == value


def test_a_boxed_number_outranks_the_last_one():
    assert check_reply("number", "He makes \\(\\boxed{10000}\\) dollars in 20 weeks.", "10,000") is True
    assert check_reply("number", "He makes \\(\\boxed{10000}\\) dollars in 20 weeks.", 20) is False
    assert check_reply("number", "\\boxed{x}, so 20", 20) is True
    assert check_reply("number", "That leaves \\boxed{\\frac{1}{2}} of 6.", 0.5) is True
    assert check_reply("number", "so half of it, 1/2.", "1/2") is True and check_reply("number", "so 2", "1/2") is False
    assert check_reply("number", "so 1,200/3", 400) is True and check_reply("number", "6/2 = 3", "3") is True
