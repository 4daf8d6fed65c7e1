"""Stand-ins for the program's functions, classes and objects, in the tests' process.

A stand-in asks the program for everything, and what it gets is data or a stand-in again. It compares by rules of this
process: the same object; the same fields for a dataclass; the same contents for a subclass of list, dict or set. A
comparison or an operator that the program would have to compute is refused (Uncheckable), because its author could make
up the result: the verdict is then neither right nor wrong.
"""

import operator
import re
import types

# Types that the tests may name in isinstance(), by the names of their classes. Their objects are not data.
NAMEABLE = {
    kind.__name__: kind
    for kind in (
        map,
        zip,
        filter,
        enumerate,
        reversed,
        types.GeneratorType,
        types.FunctionType,
        types.AsyncGeneratorType,
    )
}
ONE_BY_ONE = 64  # items of an iterator that are asked for singly before they come in chunks


class Uncheckable(BaseException):
    """The tests need something that cannot be checked from outside the program. Ends them; `except Exception` does not."""


class ClassStandIn(type):
    """The type of the classes that stand for the program's."""

    def __new__(cls, name, bases, space):
        if "stand_in_index" not in space:
            raise StandIn.border.uncheckable(f"the tests derive the class {name} from one of the program")
        return type.__new__(cls, name, bases, space)

    def __call__(cls, *args, **kwargs):
        return StandIn.border.ask("call", cls.stand_in_index, args, kwargs)

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn.border.ask("get", cls.stand_in_index, (name,))

    __doc__ = property(lambda cls: StandIn.border.ask("get", cls.stand_in_index, ("__doc__",)))

    def __setattr__(cls, name, value):
        StandIn.border.ask("set", cls.stand_in_index, (name, value))

    def __iter__(cls):
        return StandIn.border.ask("method", cls.stand_in_index, ("__iter__",))

    def __len__(cls):
        return StandIn.border.ask("method", cls.stand_in_index, ("__len__",))

    def __bool__(cls):
        return True

    def __getitem__(cls, key):
        return StandIn.border.ask("item", cls.stand_in_index, (key,))

    def __contains__(cls, value):
        return any(value is member or value == member for member in cls)


class StandIn:
    """An object of the program's. The methods that its class has there are added by stand_in_methods()."""

    __slots__ = ("stand_in_index",)
    border = None  # the Border of this process

    def __getattr__(self, name):
        return StandIn.border.ask("get", index_of(self), (name,))

    def __setattr__(self, name, value):
        StandIn.border.ask("set", index_of(self), (name, value))

    def __delattr__(self, name):
        StandIn.border.ask("delete", index_of(self), (name,))

    def __copy__(self):
        return StandIn.border.ask("copy", index_of(self), (False,))

    def __deepcopy__(self, memo):
        return StandIn.border.ask("copy", index_of(self), (True,))

    def __hash__(self):
        return hash(index_of(self))

    def __str__(self):
        return StandIn.border.ask("method", index_of(self), ("__str__",))

    def __repr__(self):
        return StandIn.border.ask("method", index_of(self), ("__repr__",))

    def __format__(self, spec):
        return StandIn.border.ask("method", index_of(self), ("__format__", spec))

    __dict__ = property(lambda self: self.__getattr__("__dict__"))
    __doc__ = property(lambda self: self.__getattr__("__doc__"))
    __module__ = property(lambda self: self.__getattr__("__module__"))


class DataStandIn:
    """A value of a subclass of a data type, such as a named tuple: compared and computed with here, as its base."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn.border.ask("get", index_of(self), (name,))

    __str__, __repr__, __format__ = StandIn.__str__, StandIn.__repr__, StandIn.__format__


class ErrorStandIn:
    """An exception of a class of the program's; it is caught as one of its bases, too."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn.border.ask("get", index_of(self), (name,))

    def __str__(self):
        return vars(self)["stand_in_text"]


SLOT = vars(StandIn)["stand_in_index"]


def index_of(value):
    """The index of a stand-in among the program's objects, None for any other value."""
    if issubclass(type(value), ClassStandIn):
        return vars(value)["stand_in_index"]
    if issubclass(type(value), StandIn):
        return SLOT.__get__(value)
    return vars(value)["stand_in_index"] if issubclass(type(value), (DataStandIn, ErrorStandIn)) else None


# ---------------------------------------------------------------- the methods of a stand-in

FORWARDED = (
    "__call__ __iter__ __reversed__ __len__ __bool__ __str__ __repr__ __format__ __bytes__ __getitem__ __setitem__ "
    "__delitem__ __enter__ __int__ __float__ __complex__ __index__ __round__ __trunc__ __floor__ __ceil__ __abs__ __neg__ "
    "__pos__ __invert__ __fspath__"
).split()
COMPARISONS = {"__lt__": operator.lt, "__le__": operator.le, "__gt__": operator.gt, "__ge__": operator.ge}


def stand_in_methods(methods, equality):
    """The methods of a class of stand-ins. methods: those that the program's class has, equality: how it compares."""
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
        space["__contains__"] = search if "__iter__" in methods else make_refusal("__contains__")
    if equality == "data":  # isinstance(x, list) is true of a subclass's
        space["__class__"] = property(lambda self: type(StandIn.border.ask("data", index_of(self))))
    return space


def make_forward(name):
    def forward(self, *args, **kwargs):
        if name == "__call__":
            return StandIn.border.ask("call", index_of(self), args, kwargs)
        return StandIn.border.ask("method", index_of(self), (name, *args), kwargs)

    return forward


def make_refusal(name):
    def refuse(self, *args):
        raise StandIn.border.uncheckable(f"{name} of an object of the program's class {type(self).__name__}")

    return refuse


def make_equal(equality):
    def equal(self, other):
        if index_of(other) is not None and index_of(self) == index_of(other):
            return True
        if equality == "fields" and type(self) is type(other):
            return contents(self, "fields") == contents(other, "fields")
        if equality == "data":
            return contents(self, "data") == contents(other, "data")
        if equality == "own" and other is not None:
            raise StandIn.border.uncheckable(f"== of an object of the program's class {type(self).__name__}")
        return NotImplemented

    return equal


def make_comparison(name, equality):
    def compare(self, other):
        if equality == "data" or equality == "fields" and type(self) is type(other):
            one, two = contents(self, equality), contents(other, equality)
            if equality == "fields":
                one, two = tuple(one.values()), tuple(two.values())
            return COMPARISONS[name](one, two)
        return make_refusal(name)(self)

    return compare


def contents(value, what):
    """What an object is compared by: its "fields" or its "data"; another value is itself."""
    return StandIn.border.ask(what, index_of(value)) if issubclass(type(value), StandIn) else value


def hash_fields(self):
    return hash(tuple(contents(self, "fields").values()))


def search(self, wanted):
    return any(item is wanted or item == wanted for item in self)


def leave(self, kind, error, trace):
    return StandIn.border.ask("method", index_of(self), ("__exit__", kind, error, None))


def wait(self):
    return StandIn.border.wait_for(index_of(self)).__await__()


def next_item(self):
    """The next item of an iterator: asked for one by one at first, since that is exact, then in chunks."""
    border, index = StandIn.border, index_of(self)
    count, items = border.buffers.setdefault(index, (0, []))
    border.buffers[index] = count + 1, items
    if count < ONE_BY_ONE:
        return border.ask("method", index, ("__next__",))
    if not items:
        items += border.ask("items", index)
    return items.pop(0)


SPECIAL = {"__next__": next_item, "__exit__": leave, "__await__": wait}
