"""verify.py: what is read out of a reply, and what a hostile program cannot do."""

import os
import random
import socket
import sys
import threading
import time

import pytest

import verify
from verify import (
    check,
    extract_choice,
    extract_code,
    extract_program,
    last_number,
    numbers_equal,
    run_program,
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
    assert verify.similarity(a, b) == pytest.approx(score, abs=5e-5)
    assert verify.similarity(b, a) == pytest.approx(score, abs=5e-5)


def test_best_place_skips_nothing():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randint(1, n))) for n in (6, 25))
        a, b = sorted((a, b), key=len)
        pieces = {b[max(0, i) : i + len(a)] for i in range(1 - len(a), len(b))} - {""}
        assert verify.best_place(a, b) == max(verify.ratio(a, p) for p in pieces)


def test_nearest_choice():
    choices = {"A": "Wrong, Not wrong", "B": "Not wrong, Not wrong", "C": "the mortgage is void", "D": "42 apples"}
    assert verify.nearest_choice("because the mortgage was void from the start", choices) == "C"
    assert verify.nearest_choice("..", choices) == "A"  # the first among equals
    start = time.time()
    verify.nearest_choice("ha " * 1000, choices)  # a degenerate reply
    assert time.time() - start < 10


# ---------------------------------------------------------------- code

BODY = "    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)"


def test_code_fenced():
    for fence in ("```python\n", "```Python\n", "```\n"):
        assert extract_code(f"Sure!\n{fence}import os\n\ndef fib(n: int) -> int:\n{BODY}\n```\nIt works.", "fib") == BODY
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


def test_check():
    assert check("number", "so it is 72.", "#### 72") is True
    assert check("number", "so it is 72.", 72) is True and check("number", "71", 72.5) is False
    assert check("number", "nothing", 72) is False
    assert all(check("number", "1", reference) is None for reference in ("none", None, True))
    assert check("choice", "The answer is B", {"letter": "B", "choices": FRUIT}) is True
    assert check("choice", "The answer is B", {"letter": "A", "choices": FRUIT}) is False
    assert check("choice", "B", {"letter": "E", "choices": FRUIT}) is None and check("choice", "B", "B") is None
    assert check("exact", " Hello World.\n", "hello world") is True and check("exact", "hello", "world") is False
    assert check("exact", "ab..", "ab") is False  # one full stop is forgiven
    code = {"tests": "assert double(4) == 8", "entry_point": "double"}
    assert check("code", "```python\ndef double(x):\n    return 2 * x\n```", code) is True
    assert check("code", "```python\ndef double(x):\n    return x\n```", code) is False
    assert check("poem", "roses", "red") is None


# ---------------------------------------------------------------- the sandbox


def fails(source, **limits):
    passed, detail = run_program(source, **limits)
    assert not passed, source
    return detail


def test_honest_programs_pass():
    assert run_program("assert 1 + 1 == 2") == (True, "passed")
    assert run_program("import math, re, json, random, hashlib, typing\nprint(hashlib.md5(b'x').hexdigest())")[0]
    assert run_program("open('notes.txt', 'w').write('x')\nassert open('notes.txt').read() == 'x'")[0]
    assert run_program("print('中文' * 3, end='')\nassert len('中文') == 2")[0]
    assert run_program("import sys\nsys.stdout.write('no newline')\nsys.stdout = None\nassert True")[0]
    assert run_program("if __name__ == '__main__':\n    raise ValueError")[0]  # a reply's demonstration does not run


def test_failures_are_told_apart():
    assert fails("assert 1 == 2") == "AssertionError"
    assert "SyntaxError" in fails("def f(:")
    assert "EOFError" in fails("input()")
    assert "timed out" in fails("import time\ntime.sleep(60)", timeout=0.5)


@pytest.mark.parametrize(
    "leave",
    ["exit(0)", "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "import os; os.close(1)"],
)
def test_leaving_early_is_failure(leave):
    fails(f"{leave}\nassert False")


def test_endless_loop():
    start = time.time()
    assert "timed out" in fails("while True:\n    pass", timeout=0.5)
    stubborn = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert "timed out" in fails(stubborn, timeout=0.5)
    assert time.time() - start < 5


def test_memory_bomb():
    assert "MemoryError" in fails("x = [0]\nwhile True:\n    x = x + x", memory_mb=256)
    assert "MemoryError" in fails("x = bytearray(1 << 34)")


def test_printing_forever():
    assert "printed more" in fails("while True:\n    print('x' * 1000)")


linux = pytest.mark.skipif(sys.platform != "linux", reason="the layers below are Linux's")


@linux
def test_fork_bomb():
    fails("import os\nfor _ in range(6):\n    os.fork()")  # at most 64 processes, should nothing hold them
    fails("import subprocess\nsubprocess.run(['true'], check=True)")
    fails("import os\nos.execv('/bin/true', ['true'])")  # exit code 0 by another program


@linux
def test_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached = []
        threading.Thread(target=lambda: reached.append(server.accept()), daemon=True).start()
        port = server.getsockname()[1]
        fails(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)", timeout=5)
        fails("import socket\nsocket.socket(socket.AF_UNIX)")
        assert not reached


@linux
def test_files(tmp_path):
    assert "File too large" in fails("f = open('x', 'wb')\nfor _ in range(100):\n    f.write(bytes(1 << 20))")
    secret = tmp_path / "secret.txt"
    secret.write_text("open sesame")
    fails(f"open({str(tmp_path / 'new.txt')!r}, 'w')")
    fails(f"open({str(secret)!r}, 'w')")
    fails(f"import os\nos.remove({str(secret)!r})")
    fails(f"import os\nos.chmod({str(secret)!r}, 0o777)\nassert False")
    assert secret.read_text() == "open sesame" and os.listdir(tmp_path) == ["secret.txt"]
    if landlock():
        assert "sesame" not in fails(f"raise ValueError(open({str(secret)!r}).read())")


def landlock():
    import ctypes

    return ctypes.CDLL(None).syscall(444, None, 0, 1) > 0


@linux
def test_secrets(monkeypatch):
    monkeypatch.setenv("API_KEY", "hunter2")
    assert run_program("import os\nassert 'API_KEY' not in os.environ and 'HOME' not in os.environ")[0]
    if landlock():
        assert "hunter2" not in fails("import os\nraise ValueError(open(f'/proc/{os.getppid()}/environ').read())")


@linux
def test_parent_is_out_of_reach():
    fails("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)")
    fails("import os, signal\nos.killpg(os.getpgid(os.getppid()), signal.SIGTERM)")
    fails("import resource\nresource.prlimit(__import__('os').getppid(), resource.RLIMIT_NOFILE, (1, 1))")


TESTS = """
import math
def check(candidate):
    assert candidate(1) == 2
    assert abs(candidate(2) - 3) < 1e-6 and math.isclose(candidate(4), 5) and len([candidate(1)]) == 1
    assert all(candidate(i) == i + 1 for i in range(3)) and sorted([candidate(2), 1]) == [1, 3]
check(inc)
"""


def examined(source):
    return run_program(source, TESTS, "inc")


def test_honest_answers_pass_the_tests():
    assert examined("def inc(x):\n    return x + 1") == (True, "passed")
    assert examined("import math\ndef sum(a, b):\n    return a + b\ndef inc(x):\n    return sum(x, 1)")[0]
    assert examined("from fractions import Fraction\ndef inc(x):\n    return Fraction(x) + 1")[0]
    assert examined("class inc(int):\n    def __new__(cls, x):\n        return int(x) + 1")[0]
    assert not examined("def inc(x):\n    return x + 2")[0] and "NameError" in examined("def other(x):\n    return x")[1]
    own = "from collections import Counter, namedtuple, defaultdict, deque\nPair = namedtuple('Pair', 'a b')\n"
    for made, want in (("Counter('aab')", "f() == {'a': 2, 'b': 1}"), ("map(int, '12')", "list(f()) == [1, 2]"),
                       ("[deque([1]), {1: (2,)}]", "f()[1] == {1: (2,)}"), ("{1: 2}.keys()", "1 in f()"),
                       ("lambda x: x", "f()(3) == 3"), ("(i for i in 'ab')", "[*f()] == ['a', 'b']")):  # fmt: skip
        assert run_program(f"{own}def f():\n    return {made}", f"assert {want}", "f")[0], made
    pair = "class Pair:\n    def __init__(self, a):\n        self.a = a\ndef f(p):\n    return p.a"
    assert run_program(pair, "assert f(Pair(3)) == 3", "f")[0]


@pytest.mark.parametrize(
    "attack",
    [
        "class Any:\n    def __eq__(self, other): return True\n    __lt__ = __gt__ = __sub__ = __eq__\n    __abs__ = lambda s: 0\n"
        "def inc(x):\n    return Any()",
        "class Any(int):\n    __eq__ = lambda a, b: True\n    __hash__ = int.__hash__\ndef inc(x):\n    return Any(2)",
        "class Any(int):\n    __eq__ = lambda a, b: True\nAny.__module__ = 'builtins'\nAny.__name__ = 'int'\n"
        "def inc(x):\n    return Any(2)",
        "def check(candidate): pass\ndef inc(x):\n    return 0",  # the tests' own check comes after
        "def inc(x):\n    return 0\ndef exit_early(*a):\n    raise SystemExit\nimport sys\nsys.excepthook = exit_early",
        "def inc(x):\n    exit(0)",
        "def inc(x):\n    raise SystemExit",
        "def inc(x):\n    import os\n    os._exit(0)",
        "def inc(x):\n    return 0\n'''",  # what follows would be a text
        "def inc(x):\n    return 0\nif False:\n    x = (",
        "import builtins\nbuiltins.AssertionError = type('Quiet', (BaseException,), {})\ndef inc(x):\n    return 0",
    ],
)
def test_tampering_with_the_tests(attack):
    assert not examined(attack)[0]


@pytest.mark.parametrize(
    "replaced",
    ["import builtins\nbuiltins.all = builtins.abs = lambda *a: 0", "import math\nmath.isclose = lambda *a, **k: True",
     "def all(*a):\n    return True\nabs = len = all", "import sys, types\nsys.modules['math'].isclose = lambda *a: True",
     "import builtins\nbuiltins.len = lambda x: 1\nbuiltins.sorted = lambda x: [1, 3]"],
)  # fmt: skip
def test_the_tests_functions_are_pythons_own(replaced):
    """Right on the first line of the tests, wrong on those that use what was replaced."""
    wrong = f"{replaced}\ndef inc(x):\n    return x + 1 if x == 1 else x + 1.5"
    assert not examined(wrong)[0]
    builtin = "assert all([False]) or abs(-3) == 3 and len([1, 2, 3]) == 3 and sorted([2, 1]) == [1, 2]\nimport math\n"
    assert run_program(replaced, builtin + "assert not math.isclose(1, 2) and not all([0])")[0]


def test_the_token_is_not_lying_about():
    """None of the places where a program would look by chance holds what would make it pass."""
    source = """
import inspect, os, re, sys
seen = [sys.argv, dict(os.environ), sys.stdin.read(), globals()]
frame = inspect.currentframe()
while frame:
    seen += [frame.f_locals, frame.f_code.co_consts]
    frame = frame.f_back
assert not re.findall("[0-9a-f]{32}", repr(seen)), seen
"""
    assert run_program(source) == (True, "passed")
    assert fails("print('0' * 32, flush=True)\nimport os\nos._exit(0)") == "0" * 32


def test_nothing_is_left_behind():
    """The child's directory is gone, and so is the child."""
    before = set(os.listdir(verify.tempfile.gettempdir()))
    fails("open('x', 'w').write('x')\nwhile True: pass", timeout=0.3)
    left = set(os.listdir(verify.tempfile.gettempdir())) - before
    assert not [name for name in left if os.path.exists(os.path.join(verify.tempfile.gettempdir(), name, "x"))]


@linux
def test_without_the_kernels_help(monkeypatch, tmp_path):
    """Where seccomp does not know the machine, the interpreter itself refuses sockets and processes."""
    copy = tmp_path / "verify.py"
    with open(verify.__file__, encoding="utf-8") as f:
        copy.write_text(f.read().replace("platform.machine()", "'other'").replace("libc.unshare(", "(lambda *_: 0)("))
    monkeypatch.setattr(verify, "__file__", str(copy))
    assert run_program("assert True")[0]
    assert "refused" in fails("import socket\nsocket.socket()")
    assert "refused" in fails("import os\nos.fork()")
    assert "refused" in fails("import subprocess\nsubprocess.run(['true'])")


CUBE = {"A": "24a8", "B": "4,000", "C": "3", "D": "2,000", "E": "7 1/2 sec"}


@pytest.mark.parametrize("reply, letter", [
    ("If (B) held, then ... The correct answer is \\boxed{E}.", "E"),
    ("Option A is wrong. So \\(\\boxed{\\text{D}}\\)", "D"),
    ("\\boxed{A}? No: \\boxed{(C) 3}", "C"),
    ("The original price is \\( \\boxed{2000} \\).", "D"),
    ("\\boxed{\\$2,000}", "D"),
    ("\\boxed{\\frac{1}{3}}, so the answer is A.", "A"),
    ("The answer is B.", "B"),  # no box: the cascade
    ("It is \\boxed{\\frac{1}{60}}. The correct choice is (B).", "B"),  # a box that is no choice
])  # fmt: skip
def test_a_boxed_choice_outranks_the_cascade(reply, letter):
    assert [x for x in CUBE if check("choice", reply, {"letter": x, "choices": CUBE})] == [letter]


def test_a_boxed_number_outranks_the_last_one():
    assert check("number", "He makes \\(\\boxed{10000}\\) dollars in 20 weeks.", "10,000") is True
    assert check("number", "He makes \\(\\boxed{10000}\\) dollars in 20 weeks.", 20) is False
    assert check("number", "\\boxed{x}, so 20", 20) is True
