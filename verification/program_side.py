"""The program's process: runs the program, then carries out the tests' requests on its objects."""

import asyncio
import copy
import dataclasses
import importlib
import json
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any, TextIO

from verification.values import IMMUTABLE, MUTABLE, decode_value, encode_value, snapshot, type_name

# Special methods that a stand-in also has if the program's class has them (stand_ins.py)
METHODS = (
    "__call__ __iter__ __next__ __reversed__ __len__ __bool__ __str__ __repr__ __format__ __bytes__ __hash__ __getitem__ "
    "__setitem__ __delitem__ __contains__ __enter__ __exit__ __int__ __float__ __complex__ __index__ __round__ __trunc__ "
    "__floor__ __ceil__ __abs__ __neg__ __pos__ __invert__ __fspath__ __await__ __lt__ __le__ __gt__ __ge__ __add__ "
    "__radd__ __sub__ __rsub__ __mul__ __rmul__ __matmul__ __rmatmul__ __truediv__ __rtruediv__ __floordiv__ "
    "__rfloordiv__ __mod__ __rmod__ __divmod__ __rdivmod__ __pow__ __rpow__ __and__ __rand__ __or__ __ror__ __xor__ "
    "__rxor__ __lshift__ __rlshift__ __rshift__ __rrshift__"
).split()
# {base: value of a subclass -> the same value as the base itself}. Methods that the subclass overrides are not called
PLAIN = {
    int: int.__int__,
    float: float.__float__,
    complex: complex.__complex__,
    str: str.__str__,
    bytes: lambda x: bytes.__getitem__(x, slice(None)),
    tuple: lambda x: tuple(tuple.__iter__(x)),
    frozenset: lambda x: frozenset(frozenset.__iter__(x)),
}
CHUNK = 64  # items of an iterator in one answer, after the first ONE_BY_ONE items (stand_ins.py)


def equality(kind: type) -> str:
    """Names how objects of a class are compared.

    "identity", "fields" (dataclasses), "data" (subclasses of list, dict and set), or "own" (an __eq__ that the program
    wrote).
    """
    method = kind.__eq__
    if method is object.__eq__:
        return "identity"
    if dataclasses.is_dataclass(kind):
        written = getattr(getattr(method, "__code__", None), "co_filename", None) != "<string>"
        return "own" if written else "fields"
    return "data" if any(method is base.__eq__ for base in MUTABLE) else "own"


class ProgramSide:
    """Carries out the tests' requests. A request names an object by its index in `objects`.

    inbox, outbox: text streams with one JSON message per line.
    """

    def __init__(self, inbox: TextIO, outbox: TextIO):
        self.inbox, self.outbox = inbox, outbox
        self.objects = []  # all objects that the tests know
        self.indexes = {}  # {id of an object: its index in objects}
        self.late_errors = {}  # {index of an iterator: the error that follows the items already sent}
        self.described = set()  # indexes of the classes that the tests know
        self.untold = set()  # indexes of classes described in the message that is not sent yet
        self.turn = threading.RLock()  # the program's threads may call functions of the tests
        self.depth = 0  # number of requests in progress

    # From here to the tests

    def keep(self, value: Any) -> int:
        """Adds an object to `objects`, unless it is there already. -> its index."""
        if id(value) not in self.indexes:
            self.indexes[id(value)] = len(self.objects)
            self.objects.append(value)  # keeps the object alive, so that no other object gets its id
        return self.indexes[id(value)]

    def encode(self, value: Any) -> Any:
        return encode_value(value, self.refer)

    def refer(self, value: Any) -> dict:
        """Encodes a value that encode_value() cannot copy."""
        kind = type(value)
        if issubclass(kind, type):
            return {"class": self.describe(value)}
        if issubclass(kind, Exception):
            return {"error": self.describe_error(value)}
        if issubclass(kind, IMMUTABLE):  # a subclass: sent as a copy, and as the object for its attributes
            base = next(base for base in IMMUTABLE if issubclass(kind, base))
            plain = PLAIN[base](value)
            return {"like": [self.describe(kind), self.keep(value), self.encode(plain)]}
        return {
            "coroutine" if isinstance(value, types.CoroutineType) else "object": [self.describe(kind), self.keep(value)]
        }

    def describe(self, kind: type) -> list:
        """A class -> [index]. The first time -> [index, name, bases, methods, equality, module].

        module: None for a class that the program defines.
        """
        index = self.keep(kind)
        if index in self.described:
            return [index]
        self.described.add(index)
        self.untold.add(index)
        bases = [
            {"type": name} if (name := type_name(base)) else {"class": self.describe(base)} for base in kind.__bases__
        ]
        found = {name: value for base in kind.__mro__[::-1] for name, value in vars(base).items() if base is not object}
        methods = [name for name in METHODS if found.get(name) is not None]
        real = None if kind.__module__ == "program" else kind.__module__
        return [index, kind.__name__, bases, methods, equality(kind), real]

    def describe_error(self, error: Exception) -> list:
        """An exception -> [class, arguments, text, index, attributes]."""
        name, args = type_name(type(error)), error.args
        if isinstance(error, OSError) and error.filename is not None:
            args = (*args[:2], error.filename)
        attributes = {k: v for k, v in getattr(error, "__dict__", {}).items() if isinstance(v, (str, int, float))}
        kind = {"type": name} if name else {"class": self.describe(type(error))}
        return [kind, self.encode(list(args)), str(error), self.keep(error), self.encode(attributes)]

    # From the tests to here

    def decode(self, packed: Any) -> Any:
        return decode_value(packed, self.resolve)

    def resolve(self, kind: str, body: Any) -> Any:
        """Decodes {kind: body}, which Link.refer() has encoded."""
        if kind == "object":
            return self.objects[body]
        if kind == "named":  # a function or class of the standard library
            return getattr(importlib.import_module(body[0]), body[1])
        if kind == "error":
            return self.decode(body[0])(*self.decode(body[1]))
        if kind == "iterator":
            return self.items_of(body)
        index, name = body

        def function(*args, **kwargs):
            return self.call_back(index, args, kwargs)

        function.__name__ = function.__qualname__ = name
        return function

    def items_of(self, index: int) -> Iterator:
        """Yields the items of an iterator of the tests."""
        while True:
            try:
                yield self.call_back(index, (), {})
            except StopIteration:
                return

    def call_back(self, index: int, args: tuple, kwargs: dict) -> Any:
        """Calls a function of the tests while they wait for an answer."""
        with self.turn:
            if not self.depth:
                raise RuntimeError("a function of the tests can only be called while they wait")
            self.tell(["ask", index, self.encode(list(args)), self.encode(dict(kwargs))])
            for line in self.inbox:
                kind, *body = json.loads(line)
                if kind == "ask":  # the function itself calls the program
                    self.answer(*body)
                elif kind == "error":
                    raise self.decode(body[0])
                else:
                    return self.decode(body[0])
            raise EOFError("the tests ended")

    def tell(self, message: list) -> None:
        """Sends a message."""
        self.untold.clear()
        self.outbox.write(json.dumps(message) + "\n")
        self.outbox.flush()

    def answer(self, action: str, index: int, packed_args: Any, packed_kwargs: Any) -> None:
        """Carries out one request and sends ["value" or "error", result, whether an argument was changed in place]."""
        changed = False
        self.depth += 1
        try:
            args, kwargs = self.decode(packed_args), self.decode(packed_kwargs)
            before = snapshot([args, kwargs])
            value = getattr(self, f"do_{action}")(self.objects[index], *args, **kwargs)
            changed = snapshot([args, kwargs]) != before
            reply = ["value", self.encode(value), changed]
        except Exception as error:
            self.described -= self.untold
            self.untold.clear()
            reply = ["error", self.refer(error), changed]
        finally:
            self.depth -= 1
        self.tell(reply)

    def do_value(self, value):
        return value

    def do_call(self, function, /, *args, **kwargs):
        return function(*args, **kwargs)

    def do_method(self, value, name, /, *args):
        if name == "__bool__":
            return bool(value)
        return getattr(type(value), name)(value, *args)

    def do_get(self, value, name):
        return getattr(value, name)

    def do_item(self, value, key):
        return value[key]

    def do_set(self, value, name, new):
        setattr(value, name, new)

    def do_delete(self, value, name):
        delattr(value, name)

    def do_fields(self, value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}

    def do_data(self, value):
        base = next(base for base in MUTABLE if isinstance(value, base))
        return set(set.__iter__(value)) if base is set else base.copy(value)

    def do_copy(self, value, deep):
        return copy.deepcopy(value) if deep else copy.copy(value)

    def do_wait(self, value):
        async def wait():
            return await value

        return asyncio.run(wait())

    def do_items(self, iterator):
        """The next CHUNK items of an iterator, or fewer at its end. An error after them is raised by the next call."""
        index, items = self.keep(iterator), []
        if index in self.late_errors:
            raise self.late_errors.pop(index)
        try:
            while len(items) < CHUNK:
                items.append(next(iterator))
        except Exception as error:
            if not items:
                raise
            self.late_errors[index] = error
        return items


def serve_program(inbox: TextIO, outbox: TextIO) -> None:
    """Runs the program, sends the tests its names, and answers their requests until they end."""
    # not __main__, so `if __name__ == "__main__"` does not run
    module = sys.modules["program"] = types.ModuleType("program")
    exec(compile(json.loads(inbox.readline()), "program.py", "exec"), module.__dict__)
    side = ProgramSide(inbox, outbox)
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    modules = {name: value.__name__ for name, value in names.items() if isinstance(value, types.ModuleType)}
    side.tell(
        [modules, {name: side.keep(value) for name, value in names.items() if name not in modules}, side.keep(module)]
    )
    for line in inbox:
        side.answer(*json.loads(line)[1:])
