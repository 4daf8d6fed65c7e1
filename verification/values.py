"""JSON messages between the program's process and the tests' process: how values are encoded and decoded.

Values of Python's own types (numbers, texts, containers, dates, paths and the like) are copied with their exact type.
Functions, objects and classes of the program are sent as references, see program_side.py and stand_ins.py.

The messages, one a line:
    tests -> program    the program's source
    program -> tests    [{name: module}, {name: index of the object}, index of the program's module]
    tests -> program    ["ask", action, index, arguments, keyword arguments]: do something with an object
    program -> tests    ["value" or "error", result, whether an argument was changed in place]
    program -> tests    before it answers, any number of ["ask", index, arguments, keyword arguments]: call a function of
                        the tests
    tests -> program    ["value" or "error", result] of that call
"""

import builtins
import importlib
import sys
from collections.abc import Callable
from typing import Any

CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
IMMUTABLE = (int, float, complex, str, bytes, tuple, frozenset)
MUTABLE = (list, dict, set)
VIEWS = {"dict_keys": dict.keys, "dict_values": dict.values, "dict_items": dict.items}


def time_arguments(x: Any) -> list:
    return [x.hour, x.minute, x.second, x.microsecond, x.tzinfo, x.fold]


# {type: (its module, value -> the arguments from which build_value() makes an equal value)}
STANDARD: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "range": ("builtins", lambda x: [x.start, x.stop, x.step]),
    "slice": ("builtins", lambda x: [x.start, x.stop, x.step]),
    "bytearray": ("builtins", lambda x: [bytes(x)]),
    "date": ("datetime", lambda x: [x.year, x.month, x.day]),
    "datetime": ("datetime", lambda x: [x.year, x.month, x.day, *time_arguments(x)]),
    "time": ("datetime", time_arguments),
    "timedelta": ("datetime", lambda x: [x.days, x.seconds, x.microseconds]),
    "timezone": ("datetime", lambda x: list(x.__getinitargs__())),
    "ZoneInfo": ("zoneinfo", lambda x: [x.key]),
    "Fraction": ("fractions", lambda x: [x.numerator, x.denominator]),
    "Decimal": ("decimal", lambda x: [str(x)]),
    "UUID": ("uuid", lambda x: [str(x)]),
    "PosixPath": ("pathlib", lambda x: [str(x)]),
    "PurePosixPath": ("pathlib", lambda x: [str(x)]),
    "PureWindowsPath": ("pathlib", lambda x: [str(x)]),
    "Path": ("pathlib", lambda x: [str(x)]),  # it has no instances; only the type itself is sent
    "deque": ("collections", lambda x: [list(x), x.maxlen]),
    "Counter": ("collections", lambda x: [dict(x)]),
    "OrderedDict": ("collections", lambda x: [list(x.items())]),
    "defaultdict": ("collections", lambda x: [x.default_factory, dict(x)]),
    "array": ("array", lambda x: [x.typecode, x.tolist()]),
}


def standard_type(name: str) -> type:
    return getattr(importlib.import_module(STANDARD[name][0]), name)


def standard_name(kind: type) -> str | None:
    """The name of a type in STANDARD, None for any other type."""
    name = kind.__name__
    known = name in STANDARD and getattr(sys.modules.get(STANDARD[name][0]), name, None) is kind
    return name if known else None


def type_name(kind: type) -> str | None:
    """The name under which a type is sent, if it is in STANDARD or built in. None for any other type."""
    return standard_name(kind) or (kind.__name__ if getattr(builtins, kind.__name__, None) is kind else None)


def type_by_name(name: str) -> type:
    """The inverse of type_name. Raises TypeError for other names, so that no function can be sent by name."""
    kind = standard_type(name) if name in STANDARD else getattr(builtins, name, None)
    if not isinstance(kind, type):
        raise TypeError(f"{name!r} is not a type that can be sent")
    return kind


def build_value(name: str, args: list) -> Any:
    """Makes a value of a type in STANDARD."""
    if name in ("datetime", "time"):
        return standard_type(name)(*args[:-1], fold=args[-1])
    return standard_type(name)(*args)


def encode_value(value: Any, refer: Callable[[Any], dict]) -> Any:
    """A value -> JSON.

    refer(value) encodes what cannot be copied, as an object with one key. decode_value passes it to resolve().
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return {"int": hex(value)}  # in decimal Python refuses more than 4300 digits
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is dict:
        return {"dict": [[encode_value(k, refer), encode_value(v, refer)] for k, v in value.items()]}
    if kind.__name__ in CONTAINERS and kind is CONTAINERS[kind.__name__]:
        return {kind.__name__: [encode_value(x, refer) for x in value]}
    if kind.__name__ in VIEWS and kind.__module__ == "builtins":
        return {kind.__name__: [encode_value(x, refer) for x in value]}
    if name := standard_name(kind):
        return {"standard": [name, [encode_value(x, refer) for x in STANDARD[name][1](value)]]}
    if isinstance(value, type) and (name := type_name(value)):
        return {"type": name}
    if kind.__module__ == "numpy" and hasattr(kind, "tolist"):  # as lists and Python's numbers, which do not wrap
        return {"numpy": encode_value(value.tolist(), refer)}
    return refer(value)


def snapshot(value: Any) -> Any:
    """A value -> JSON that changes if the data in the value change. What is not data is compared by identity."""
    return encode_value(value, id)


def decode_value(packed: Any, resolve: Callable[[str, Any], Any]) -> Any:
    """The inverse of encode_value. resolve(key, body) decodes references. Any input gives only data."""
    if not isinstance(packed, dict):
        return packed
    ((kind, body),) = packed.items()
    if kind in CONTAINERS:
        return CONTAINERS[kind](decode_value(x, resolve) for x in body)
    if kind == "dict":
        return {decode_value(k, resolve): decode_value(v, resolve) for k, v in body}
    if kind in VIEWS:
        items = [decode_value(x, resolve) for x in body]
        if kind == "dict_keys":
            return VIEWS[kind](dict.fromkeys(items))
        return VIEWS[kind](dict(enumerate(items)) if kind == "dict_values" else dict(items))
    if kind == "standard":
        return build_value(body[0], [decode_value(x, resolve) for x in body[1]])
    readers = {
        "int": lambda x: int(x, 16),
        "complex": lambda x: complex(*x),
        "bytes": bytes.fromhex,
        "type": type_by_name,
    }
    return readers[kind](body) if kind in readers else resolve(kind, body)
