"""Stand-ins in the tests' process for the program's functions, classes and objects.

A stand-in sends every access to the program and gets data or another stand-in back. Only comparisons are computed here:
two stand-ins are equal if they are the same object, or have the same fields (dataclasses) or the same contents
(subclasses of list, dict and set). The program would have to compute any other comparison or operator, and could make
up the result. So it raises Uncheckable, and the program counts as neither right nor wrong.
"""

import operator
import re
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# {class name: type} of the types that the tests may name in isinstance() and whose objects are not data
NAMEABLE = (map, zip, filter, enumerate, reversed, types.GeneratorType, types.FunctionType, types.AsyncGeneratorType)
NAMEABLE = {kind.__name__: kind for kind in NAMEABLE}
UNCHECKABLE = 3  # exit status of the tests' process after Uncheckable
ONE_BY_ONE = 64  # items of an iterator that are fetched one at a time before they are fetched in chunks


class Uncheckable(BaseException):
    """The tests need something that cannot be checked from outside the program.

    It ends the tests. `except Exception` in a test does not catch it.
    """


class ClassStandIn(type):
    """The metaclass of the stand-ins for the program's classes."""

    def __new__(cls, name, bases, space):
        if "stand_in_index" not in space:
            raise StandIn.link.uncheckable(f"the tests derive the class {name} from a class of the program")
        return type.__new__(cls, name, bases, space)

    def __call__(cls, *args, **kwargs):
        return StandIn.link.ask("call", cls.stand_in_index, args, kwargs)

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn.link.ask("get", cls.stand_in_index, (name,))

    __doc__ = property(lambda cls: StandIn.link.ask("get", cls.stand_in_index, ("__doc__",)))

    def __setattr__(cls, name, value):
        StandIn.link.ask("set", cls.stand_in_index, (name, value))

    def __iter__(cls):
        return StandIn.link.ask("method", cls.stand_in_index, ("__iter__",))

    def __len__(cls):
        return StandIn.link.ask("method", cls.stand_in_index, ("__len__",))

    def __bool__(cls):
        return True

    def __getitem__(cls, key):
        return StandIn.link.ask("item", cls.stand_in_index, (key,))

    def __contains__(cls, value):
        return any(value is member or value == member for member in cls)


class StandIn:
    """A stand-in for an object of the program. stand_in_methods() adds the methods of the object's class."""

    __slots__ = ("stand_in_index",)
    link = None  # the tests_side.Link of this process

    def __getattr__(self, name):
        return StandIn.link.ask("get", index_of(self), (name,))

    def __setattr__(self, name, value):
        StandIn.link.ask("set", index_of(self), (name, value))

    def __delattr__(self, name):
        StandIn.link.ask("delete", index_of(self), (name,))

    def __copy__(self):
        return StandIn.link.ask("copy", index_of(self), (False,))

    def __deepcopy__(self, memo):
        return StandIn.link.ask("copy", index_of(self), (True,))

    def __hash__(self):
        return hash(index_of(self))

    def __str__(self):
        return StandIn.link.ask("method", index_of(self), ("__str__",))

    def __repr__(self):
        return StandIn.link.ask("method", index_of(self), ("__repr__",))

    def __format__(self, spec):
        return StandIn.link.ask("method", index_of(self), ("__format__", spec))

    __dict__ = property(lambda self: self.__getattr__("__dict__"))
    __doc__ = property(lambda self: self.__getattr__("__doc__"))
    __module__ = property(lambda self: self.__getattr__("__module__"))


class DataStandIn:
    """A copy of a value whose class is derived from a data type, such as a named tuple.

    Comparisons and operators are those of the data type, computed in this process.
    """

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn.link.ask("get", index_of(self), (name,))

    __str__, __repr__, __format__ = StandIn.__str__, StandIn.__repr__, StandIn.__format__


class ErrorStandIn:
    """A stand-in for an exception of the program's own class. The tests can also catch it by its base classes."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn.link.ask("get", index_of(self), (name,))

    def __str__(self):
        return vars(self)["stand_in_text"]


SLOT = vars(StandIn)["stand_in_index"]


def index_of(value: Any) -> int | None:
    """A stand-in's index in the program's list of objects. None for any other value."""
    if issubclass(type(value), ClassStandIn):
        return vars(value)["stand_in_index"]
    if issubclass(type(value), StandIn):
        return SLOT.__get__(value)
    return vars(value)["stand_in_index"] if issubclass(type(value), (DataStandIn, ErrorStandIn)) else None


# ---------------------------------------------------------------------------------------------------------------------
# The methods of a stand-in

FORWARDED = (
    "__call__ __iter__ __reversed__ __len__ __bool__ __str__ __repr__ __format__ __bytes__ __getitem__ __setitem__ "
    "__delitem__ __enter__ __int__ __float__ __complex__ __index__ __round__ __trunc__ __floor__ __ceil__ __abs__ __neg__ "
    "__pos__ __invert__ __fspath__"
).split()
COMPARISONS = {"__lt__": operator.lt, "__le__": operator.le, "__gt__": operator.gt, "__ge__": operator.ge}


def stand_in_methods(methods: list[str], equality: str) -> dict[str, Any]:
    """The attributes of a stand-in class.

    methods: the names of the special methods of the program's class. equality: how its objects compare, see
    program_side.equality().
    """
    space = {"__eq__": make_equal(equality), "__hash__": StandIn.__hash__ if equality == "identity" else None}
    for name in methods:
        if name in FORWARDED:
            space[name] = make_forward(name)
        elif name in COMPARISONS:
            space[name] = make_comparison(name, equality)
        elif name not in SPECIAL and re.fullmatch("__[a-z]+__", name):
            space[name] = make_refusal(name)
    space.update({name: method for name, method in SPECIAL.items() if name in methods})
    if "__hash__" in methods:
        space["__hash__"] = hash_fields if equality == "fields" else make_forward("__hash__")
    if "__contains__" in methods:
        space["__contains__"] = contains_item if "__iter__" in methods else make_refusal("__contains__")
    if equality == "data":  # makes isinstance(x, list) true for a subclass of list
        space["__class__"] = property(lambda self: type(StandIn.link.ask("data", index_of(self))))
    return space


def make_forward(name: str) -> Callable:
    """A method that the program computes."""

    def forward(self, *args, **kwargs):
        if name == "__call__":
            return StandIn.link.ask("call", index_of(self), args, kwargs)
        return StandIn.link.ask("method", index_of(self), (name, *args), kwargs)

    return forward


def make_refusal(name: str) -> Callable:
    """A method that raises Uncheckable."""

    def refuse(self, *args):
        raise StandIn.link.uncheckable(f"{name} of an object of the program's class {type(self).__name__}")

    return refuse


def make_equal(equality: str) -> Callable:
    """The method __eq__ of a stand-in class."""

    def equal(self, other):
        if index_of(other) is not None and index_of(self) == index_of(other):
            return True
        if equality == "fields" and type(self) is type(other):
            return contents(self, "fields") == contents(other, "fields")
        if equality == "data":
            return contents(self, "data") == contents(other, "data")
        if equality == "own" and other is not None:
            raise StandIn.link.uncheckable(f"== of an object of the program's class {type(self).__name__}")
        return NotImplemented

    return equal


def make_comparison(name: str, equality: str) -> Callable:
    """A method of COMPARISONS: refused, except for dataclasses and subclasses of data types."""

    def compare(self, other):
        if equality == "data" or equality == "fields" and type(self) is type(other):
            one, two = contents(self, equality), contents(other, equality)
            if equality == "fields":
                one, two = tuple(one.values()), tuple(two.values())
            return COMPARISONS[name](one, two)
        return make_refusal(name)(self)

    return compare


def contents(value: Any, what: str) -> Any:
    """The "fields" or "data" by which a stand-in is compared. Any other value is returned unchanged."""
    return StandIn.link.ask(what, index_of(value)) if issubclass(type(value), StandIn) else value


def hash_fields(self: StandIn) -> int:
    return hash(tuple(contents(self, "fields").values()))


def contains_item(self: Iterable, wanted: Any) -> bool:
    return any(item is wanted or item == wanted for item in self)


def leave(self: StandIn, kind: type | None, error: BaseException | None, trace: Any) -> Any:
    return StandIn.link.ask("method", index_of(self), ("__exit__", kind, error, None))


def wait(self: StandIn) -> Iterator:
    return StandIn.link.wait_for(index_of(self)).__await__()


def next_item(self: StandIn) -> Any:
    """The next item of an iterator.

    The first ONE_BY_ONE items are fetched one at a time, so the program computes no further than the tests read. Later
    items are fetched in chunks, for speed.
    """
    link, index = StandIn.link, index_of(self)
    count, items = link.buffers.setdefault(index, (0, []))
    link.buffers[index] = count + 1, items
    if count < ONE_BY_ONE:
        return link.ask("method", index, ("__next__",))
    if not items:
        items += link.ask("items", index)
    return items.pop(0)


SPECIAL = {"__next__": next_item, "__exit__": leave, "__await__": wait}
