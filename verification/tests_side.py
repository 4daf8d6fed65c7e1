"""The tests' process: runs the tests and sends their calls to the program's process (program_side.py)."""

import ast
import builtins
import contextlib
import functools
import importlib
import json
import operator
import re
import sys
import types
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TextIO

from verification.stand_ins import (
    NAMEABLE,
    SLOT,
    ClassStandIn,
    DataStandIn,
    ErrorStandIn,
    StandIn,
    Uncheckable,
    index_of,
    stand_in_methods,
)
from verification.values import IMMUTABLE, decode_value, encode_value, snapshot, type_name

ALIASES = {"np": "numpy", "pd": "pandas"}
# Types of functions that the tests may pass to the program
CALLABLE = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    functools.partial,
    operator.itemgetter,
    operator.attrgetter,
    operator.methodcaller,
)
# Names of things that the two processes do not share: streams, patches, random numbers, settings, inspection of code.
# Tests that use them may fail for a right program.
NOT_SHARED = frozenset(
    "stdin stdout stderr input redirect_stdout patch mock monkeypatch capsys seed environ chdir setrecursionlimit "
    "getcontext setcontext localcontext catch_warnings warns assertWarns assertLogs inspect dataclasses __annotations__ "
    "__cause__ __context__ __notes__ __traceback__ get_type_hints getsource globals gc weakref tracemalloc".split()
)


class Link:
    """Connects this process with the program's process, and keeps the stand-ins for its objects and classes.

    inbox, outbox: text streams with one JSON message per line.
    """

    def __init__(self, inbox: TextIO, outbox: TextIO):
        self.inbox, self.outbox = inbox, outbox
        self.classes, self.objects = {}, {}  # {index: stand-in} of the program's classes and objects
        self.buffers = {}  # {index of an iterator: (items read, items fetched ahead)}
        self.callbacks = []  # functions of the tests that the program may call
        self.changed = False  # the program changed an argument in place, and the tests may still use that argument
        self.numpy = False  # the program sent values of numpy, which arrive as lists and numbers
        self.reason = None  # why the first Uncheckable was raised; the tests may catch it
        self.errors = []  # exceptions of the program that were raised here
        self.unshared = [0, 0]  # from measure_unshared()

    def uncheckable(self, reason: str) -> Uncheckable:
        self.reason = self.reason or reason
        return Uncheckable(reason)

    # From here to the program

    def ask(self, action: str, index: int, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Asks the program to do something with an object -> its answer. Raises the exception that the program raised.

        action: the name of a ProgramSide method after "do_". index: of the object in the program's list. With None the
        answer is the arguments' reference counts, see measure_unshared().
        """
        kwargs = kwargs or {}
        counts = []
        for given in (args, kwargs.values()):
            counts.append(max((sys.getrefcount(x) for x in given if type(x) in (list, dict, set)), default=0))
        if index is None:
            return counts
        # The tests hold an argument if its reference count is higher than in f([1, 2]), where only the call holds it.
        # Only then can they see that the program has changed it in place
        shared = any(count > unshared for count, unshared in zip(counts, self.unshared))
        self.tell(["ask", action, index, self.encode(list(args)), self.encode(kwargs)])
        while True:
            line = self.inbox.readline()
            if not line:
                raise EOFError("the program ended during the tests")
            kind, *body = json.loads(line)
            if kind == "ask":
                self.call_back(*body)
                continue
            self.changed |= shared and bool(body[1])
            value = self.decode(body[0])
            if kind == "value":
                return value
            if isinstance(value, StopIteration) and action not in ("items", "method"):
                value = RuntimeError("StopIteration")  # would silently end a loop in the tests
            self.errors.append(value)
            raise value if isinstance(value, Exception) else RuntimeError("the program answered without an exception")

    def measure_unshared(self) -> None:
        """Measures the reference counts of an argument that only the call holds: [positional, by name].

        They depend on the Python version and on the calls between a stand-in and ask().
        """
        space = {"stand_in_index": 0, **stand_in_methods(["__call__"], "own")}
        probe = object.__new__(ClassStandIn("probe", (StandIn,), space))
        SLOT.__set__(probe, None)
        self.unshared = [probe([])[0], probe(x=[])[1]]

    def call_back(self, index: int, args: Any, kwargs: Any) -> None:
        """Calls a function of the tests for the program and sends the result."""
        try:
            reply = ["value", self.encode(self.callbacks[index](*self.decode(args), **self.decode(kwargs)))]
        except Exception as error:
            reply = ["error", self.encode(error)]
        self.tell(reply)

    def tell(self, message: list) -> None:
        self.outbox.write(json.dumps(message) + "\n")
        self.outbox.flush()

    def encode(self, value: Any) -> Any:
        return encode_value(value, self.refer)

    def refer(self, value: Any) -> dict:
        """Encodes a value that encode_value() cannot copy. Raises Uncheckable if the program cannot use it either."""
        if (index := index_of(value)) is not None:
            return {"object": index}
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if module in sys.stdlib_module_names and getattr(sys.modules.get(module), name, None) is value:
            return {"named": [module, name]}
        if isinstance(value, Exception) and type_name(type(value)):
            return {"error": [self.encode(type(value)), self.encode(list(value.args))]}
        if hasattr(value, "__next__"):
            self.callbacks.append(value.__next__)
            return {"iterator": len(self.callbacks) - 1}
        if isinstance(value, CALLABLE):
            self.callbacks.append(value)
            return {"callback": [len(self.callbacks) - 1, getattr(value, "__name__", "function")]}
        raise self.uncheckable(f"the tests pass an object of {type(value)}, which cannot be copied")

    # From the program to here

    def decode(self, packed: Any) -> Any:
        return decode_value(packed, self.resolve)

    def resolve(self, kind: str, body: Any) -> Any:
        """Decodes {kind: body}, which ProgramSide.refer() has encoded."""
        if kind == "class":
            return self.class_of(body)
        if kind == "error":
            return self.error_of(*body)
        if kind == "numpy":
            self.numpy = True
            return self.decode(body)
        description, index, *base = body
        if kind == "coroutine":
            return self.wait_for(index)
        if index not in self.objects:
            local = self.class_of(description)
            if kind == "like":
                value = local.__new__(local, self.decode(base[0]))
                value.__dict__["stand_in_index"] = index
            else:
                value = object.__new__(local if issubclass(local, StandIn) else StandIn)
                SLOT.__set__(value, index)
            self.objects[index] = value
        elif kind == "object":
            self.class_of(description)
        return self.objects[index]

    async def wait_for(self, index: int) -> Any:
        return self.ask("wait", index)

    def class_of(self, description: list) -> type:
        """The stand-in class for a class of the program.

        description: its index. The first message that names the class adds what ProgramSide.describe() lists.
        """
        index, *rest = description
        if index in self.classes:
            return self.classes[index]
        name, bases, methods, equality, module = rest
        if module is not None and (real := real_exception(module, name)):
            self.classes[index] = real
            return real
        local = [self.decode(base) for base in bases]
        if errors := [base for base in local if issubclass(base, Exception)]:
            bases, space = without_inherited([*errors, ErrorStandIn], errors), {}
        elif data := [base for base in local if issubclass(base, IMMUTABLE)]:
            bases, space = without_inherited([DataStandIn, *data], data), {}
        else:
            bases = [base for base in local if isinstance(base, ClassStandIn)] or [StandIn]
            space = {"__slots__": (), "__doc__": StandIn.__dict__["__doc__"], **stand_in_methods(methods, equality)}
            if module == "builtins" and name in NAMEABLE:
                space["__class__"] = property(lambda self: NAMEABLE[name])
        self.classes[index] = ClassStandIn(str(name), tuple(bases), {**space, "stand_in_index": index})
        return self.classes[index]

    def error_of(self, kind: Any, args: Any, text: str, index: int, attributes: Any) -> Exception:
        """The exception to raise here. The arguments are those of ProgramSide.describe_error()."""
        kind, args, attributes = self.decode(kind), self.decode(args), self.decode(attributes)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return RuntimeError(text)
        if isinstance(kind, ClassStandIn):
            error = kind.__new__(kind, *args)
            error.__dict__.update(attributes, stand_in_index=index, stand_in_text=text)
            return error
        try:
            error = kind(*args) if type_name(kind) else kind.__new__(kind, *args)
        except (TypeError, ValueError):
            return RuntimeError(text)
        error.args = tuple(args) if not isinstance(error, OSError) else error.args
        error.__dict__.update({k: v for k, v in attributes.items() if not k.startswith("__")})
        return error


def without_inherited(bases: list[type], others: list[type]) -> list[type]:
    """The bases of a class, without a mixin that one of `others` already inherits from."""
    mixins = (ErrorStandIn, DataStandIn)
    return [base for base in bases if base not in mixins or not any(issubclass(other, base) for other in others)]


def real_exception(module: str, name: str) -> type[Exception] | None:
    """An exception class of the standard library. None if there is none of this name."""
    if module.split(".")[0] in sys.stdlib_module_names and "__" not in module:
        kind = getattr(importlib.import_module(module), name, None)
        return kind if isinstance(kind, type) and issubclass(kind, Exception) else None


# ---------------------------------------------------------------------------------------------------------------------
# Running the tests


def real_module(name: str, attributes: Iterable[str] = ()) -> ModuleType | None:
    """A module of the standard library or of ALIASES. None if it cannot be imported or lacks one of the attributes."""
    if name.split(".")[0] not in (*sys.stdlib_module_names, *ALIASES.values()) or "__" in name:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return module if all(hasattr(module, attribute) for attribute in attributes) else None


def program_names(
    link: Link, tests: str, entry_point: str | None, modules: dict[str, str], names: dict[str, int]
) -> dict[str, Any]:
    """The program's names that the tests use -> {name: value or stand-in}.

    modules: {name: module} of the modules that the program imports. names: {name: index of the object}. If the tests
    use a name only as a module ("math.sqrt"), they get the real module, even if the program assigned something else to
    it.
    """
    attributes, bare = {}, set()
    for node in ast.walk(ast.parse(tests)):  # walk() yields a node before its children
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.setdefault(node.value.id, set()).add(node.attr)
            node.value.id = ""
        elif isinstance(node, ast.Name):
            bare.add(node.id)
    words = {word for word in re.findall(r"\w+", tests) if word == entry_point or not hasattr(builtins, word)}
    known = {}
    for word in words & {*modules, *names}:
        if word != entry_point and word not in bare and word in attributes:
            known[word] = real_module(ALIASES.get(word, word), attributes[word])
        if known.get(word) is None and word in modules:
            known[word] = real_module(modules[word])
    known = {word: module for word, module in known.items() if module is not None}
    return known | {word: link.ask("value", names[word]) for word in words & {*names} - {*known}}


def run_tests(inbox: TextIO, outbox: TextIO, source: str, tests: str, entry_point: str | None) -> None:
    """Sends the source to the program's process, then runs the tests on the names that it defines.

    Raises what the tests raise, or Uncheckable.
    """
    code = compile(tests, "tests.py", "exec")
    link = StandIn.link = Link(inbox, outbox)
    link.measure_unshared()
    link.tell(source)
    line = inbox.readline()
    if not line:
        sys.exit(1)  # the program failed, and its process has printed why
    modules, names, module = json.loads(line)
    known = program_names(link, tests, entry_point, modules, names)
    used = names_used(tests)
    before = {name: snapshot(value) for name, value in known.items() if name in names and name in used}
    try:
        exec(code, {**known, "__builtins__": builtins, "__name__": "tests"})
    except Exception as error:
        if reason := why_uncheckable(link, error, used) or changed_name(link, before, known, module):
            raise link.uncheckable(reason) from error
        raise
    if reason := link.reason or changed_name(link, before, known, module):
        raise Uncheckable(reason)


def why_uncheckable(link: Link, error: Exception, used: set[str]) -> str | None:
    """Why this error may be the tests' fault, although the program is right. None if the program is wrong.

    used: the names that the tests use, see names_used().
    """
    if unshared := sorted(used & NOT_SHARED):
        return f"the tests use {unshared[0]}, which the program does not share with them"
    own = error in link.errors  # raised by the program
    if isinstance(error, AssertionError) and link.changed and not own:
        return "the program changes an argument in place, but the tests hold a copy"
    if isinstance(error, (TypeError, AttributeError)) and not own:
        if [value for value in link.objects.values() if not callable(value)]:
            return f"{error} (an object of the program)"
    if link.numpy and not own:
        return "the tests receive numpy's values as lists and numbers"
    return None


def changed_name(link: Link, before: dict, known: dict, module: int) -> str | None:
    """Names a variable that differs between the program and the tests' copy. None if all are equal.

    before: {name: snapshot at the start} of the variables that the tests use. known: {name: value} in the tests.
    module: index of the program's module.
    """
    with contextlib.suppress(EOFError, OSError, ValueError):  # the program has ended or does not answer
        for name, value in before.items():
            if snapshot(known[name]) != value or snapshot(link.ask("get", module, (name,))) != value:
                return f"the program and the tests each have a copy of {name}, and one of them was changed"
    return None


def names_used(tests: str) -> set[str]:
    """The names that the tests read but do not assign, with attributes and imports."""
    used, own = set(), set()
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else own).add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]:
                used.update(name.split("."))
    return used - own
