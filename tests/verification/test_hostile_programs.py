"""Programs that try to have wrong answers counted as right, by the objects that they return and the names that they take."""

import pytest

from verification.sandbox import run_program

ANY = """
class Any:
    def __init__(self, *args, **kwargs): pass
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __hash__(self): return 0
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __mul__ = __mod__ = __and__ = __xor__ = __sub__
    def __bool__(self): return True
"""
# (the program, a test that a right program of its kind would pass)
ATTACKS = [
    ("def f01(x): return Any()", "assert f01(1) == 2"),
    ("def f02(x): return Any()", "assert 2 == f02(1)"),
    ("def f03(x): return Any()", "assert not f03(1) != 2"),
    ("def f04(x): return Any()", "assert abs(f04(1) - 2) < 1e-6"),
    ("def f05(x): return Any()", "assert 2 - f05(1) == 0"),
    ("def f06(x): return Any()", "assert 1 < f06(1) < 3"),
    ("def f07(x): return Any()", "assert f07(1) in (2, 3)"),
    ("def f08(x): return Any()", "assert 7 in f08(1)"),
    ("def f09(x): return [Any()]", "assert f09(1) == [2]"),
    ("def f10(x): return {1: Any()}", "assert f10(1) == {1: 2}"),
    ("def f11(x): return (Any(), Any())", "a, b = f11(1)\nassert a == b == 3"),
    ("def f12(x): return Any()", "assert {f12(1)} == {2}"),
    ("class Int13(int):\n    __eq__ = lambda a, b: True\n    __hash__ = int.__hash__\ndef f13(x): return Int13(9)",
     "assert f13(1) == 2"),
    ("class Str14(str):\n    __eq__ = lambda a, b: True\n    __hash__ = str.__hash__\ndef f14(x): return Str14('b')",
     "assert f14(1) == 'a'"),
    ("class List15(list):\n    __eq__ = lambda a, b: True\ndef f15(x): return List15([9])", "assert f15(1) == [2]"),
    ("class Tuple16(tuple):\n    __eq__ = lambda a, b: True\ndef f16(x): return Tuple16((9,))", "assert f16(1) == (2,)"),
    ("class Dict17(dict):\n    __eq__ = lambda a, b: True\ndef f17(x): return Dict17(a=9)", "assert f17(1) == {'a': 2}"),
    ("class Float18(float):\n    __sub__ = lambda a, b: 0.0\ndef f18(x): return Float18(9)", "assert abs(f18(1) - 2) < 1e-6"),
    ("from fractions import Fraction\nclass Fraction19(Fraction):\n    __eq__ = lambda a, b: True\n"
     "def f19(x): return Fraction19(9)", "assert f19(1) == 2"),
    ("import datetime\nclass Date20(datetime.date):\n    __eq__ = lambda a, b: True\ndef f20(x): return Date20(1, 1, 1)",
     "import datetime\nassert f20(1) == datetime.date(2, 2, 2)"),
    ("from dataclasses import dataclass\n@dataclass\nclass V21:\n    x: int\n    __eq__ = lambda a, b: True\n"
     "def f21(x): return V21(9)", "assert f21(1) == V21(2)"),
    ("class V22:\n    def __init__(self, x): self.x = x\n    __eq__ = lambda a, b: True\ndef f22(x): return V22(9)",
     "assert f22(1) == V22(2)"),
    ("import unittest.mock\ndef f23(x): return unittest.mock.ANY", "assert f23(1) == 2"),
    ("import unittest.mock\ndef f24(x): return type(unittest.mock.ANY)", "assert f24(1)() == 2"),
    ("import os\ndef f25(x): return os._exit", "assert f25(1)(0) == 2"),
    ("import sys\ndef f26(x): return sys.exit", "assert f26(1)(0) == 2"),
    ("def f27(x): raise StopIteration", "assert all(map(lambda i: f27(i) == i, [1, 2]))\nassert [*map(f27, [1])]"),
    ("class E28(StopIteration): pass\ndef f28(x): raise E28", "assert all(map(lambda i: f28(i) == i, [1, 2]))"),
    ("class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f29(x): return 9", "assert math.isclose(f29(1), 2)"),
    ("class sys:\n    maxsize = 9\ndef f30(x): return 9", "assert f30(1) == sys.maxsize"),
    ("class np:\n    allclose = staticmethod(lambda *a, **k: True)\ndef f31(x): return 9", "assert np.allclose(f31(1), 2)"),
    ("import types\nstatistics = types.ModuleType('statistics')\nstatistics.mean = lambda v: 9\ndef f32(x): return 9",
     "assert f32(1) == statistics.mean([2])"),
    ("def len(x): return 2\ndef f33(x): return [9]", "assert len(f33(1)) == 2"),
    ("import copy\ncopy.deepcopy = lambda x: Any()\ndef f34(x): return 9", "import copy\nassert f34(1) == copy.deepcopy(2)"),
    ("def f35(v):\n    v.clear()\n    return []", "v35 = [2, 1]\nassert f35(v35) == sorted(v35)"),
    ("def f36(g): return g(2) and 9", "assert f36(lambda v: v) == 2"),
    ("class V37:\n    def __class_getitem__(cls, k): return cls\n    def __instancecheck__(cls, x): return True\n"
     "def f37(x): return V37", "assert isinstance(f37(1), int)"),
    ("class V38:\n    __class__ = property(lambda self: int)\n    __eq__ = lambda a, b: True\ndef f38(x): return V38()",
     "assert isinstance(f38(1), int) and f38(1) == 2"),
    ("class E39(Exception):\n    __eq__ = lambda a, b: True\ndef f39(x): return E39()", "assert f39(1) == 2"),
    ("class M40(type):\n    __eq__ = lambda a, b: True\n    __hash__ = type.__hash__\nclass V40(metaclass=M40): pass\n"
     "def f40(x): return V40", "assert f40(1) == 2"),
    ("class int41(int): pass\nint41.__name__ = 'int'\nint41.__module__ = 'builtins'\nint41.__eq__ = lambda a, b: True\n"
     "def f41(x): return int41(9)", "assert f41(1) == 2"),
    ("import operator\nclass B42:\n    __reduce__ = lambda self: (int, ('2',))\ndef f42(x): return B42()", "assert f42(1) == 2"),
    ("class map:\n    __eq__ = lambda a, b: True\nmap.__module__ = 'builtins'\ndef f43(x): return map()",
     "assert isinstance(f43(1), map) and f43(1) == 2"),
    ("class function:\n    __eq__ = lambda a, b: True\nfunction.__module__ = 'builtins'\ndef f44(x): return function()",
     "assert callable(f44(1)) or f44(1) == 2"),
    ("import threading, os\ndef f45(x):\n    threading.Thread(target=os.abort).start()\n    return 9", "assert f45(1) == 2"),
]  # fmt: skip

# These end a run of many as one that cannot be checked
ALONE = [
    ("import numpy as np\ndef f(x): return np.float16('inf')", "assert f(1) == 1e6"),
    ("import numpy as np\ndef f(x): return np.int64(2 - 2**63)", "assert abs(f(1) - 2) < 1e-6"),
    ("import numpy as np\ndef f(x): return np.array([2 - 2**63])", "assert abs(f(1) - 2) < 1e-6"),
    ("import numpy as np\ndef f(x): return np.array([])", "assert not f(1) != 2"),
    ("import numpy as np\nclass Array(np.ndarray):\n    __module__ = 'numpy'\n    tolist = lambda self: Any()\n"
     "def f(x): return np.zeros(1).view(Array)", "assert f(1) == 2"),
    ("log = []\ndef f(x):\n    log.append(x)\n    return 2", "f(1)\nassert log == []"),
]  # fmt: skip


def attempt(number, test):
    indented = test.replace("\n", "\n    ")
    return f"try:\n    {indented}\n    fooled.append({number})\nexcept BaseException:\n    pass\n"


@pytest.mark.parametrize("first", range(0, len(ATTACKS), 11))
def test_wrong_answers_are_never_right(first):
    """Many in one run: each test notes whether it held. What cannot be checked ends a run of its own as not right."""
    group = ATTACKS[first : first + 11]
    program = ANY + "\n".join(source for source, _ in group)
    tests = "fooled = []\n" + "".join(attempt(n, test) for n, (_, test) in enumerate(group, first + 1))
    passed, detail = run_program(program, tests + "assert not fooled, fooled", timeout=30)
    assert passed is not False, detail


@pytest.mark.parametrize("number", [1, 4, 15, 22, 29, 35])
def test_attacks_one_by_one(number):
    program, test = ATTACKS[number - 1]
    passed, detail = run_program(ANY + program, test)
    assert not passed, detail


@pytest.mark.parametrize("program, test", ALONE)
def test_attacks_that_cannot_be_checked(program, test):
    assert not run_program(ANY + program, test)[0]


def test_a_caught_refusal_is_no_pass():
    tests = "try:\n    right = f() == 2\nexcept BaseException:\n    right = True\nassert right"
    assert run_program(ANY + "def f(): return Any()", tests)[0] is None
