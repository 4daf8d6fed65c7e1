"""Values that cross the border between the program's process and the tests' process."""

import importlib

CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}  # exact ones, and the modules that have them
ACTIONS = {"call": lambda f, *args, **kwargs: f(*args, **kwargs), "iterate": list, "get": getattr, "set": setattr,
           "value": lambda x: x}  # fmt: skip


def encode_value(value, refer):
    """A value as JSON: data of subclasses as their base (a Counter is a dict), anything else as refer(value), a number."""
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}  # in decimal Python refuses more than 4300 digits
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode_value(k, refer), encode_value(v, refer)] for k, v in value.items()]}
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [encode_value(x, refer) for x in value]}
    kind = type(value)
    if NUMBERS.get(kind.__name__) == kind.__module__:
        return {kind.__name__: str(value)}
    if hasattr(kind, "tolist"):  # numpy's arrays and numbers
        return encode_value(value.tolist(), refer)
    return {"object": refer(value)}


def decode_value(packed, resolve):
    """pack's inverse; resolve turns a number into an object. Whatever it is given, what comes out is data."""
    if not isinstance(packed, dict):
        return packed
    ((kind, body),) = packed.items()
    if kind in CONTAINERS:
        return CONTAINERS[kind](decode_value(x, resolve) for x in body)
    if kind == "dict":
        return {decode_value(k, resolve): decode_value(v, resolve) for k, v in body}
    if kind in NUMBERS:
        return getattr(importlib.import_module(NUMBERS[kind]), kind)(body)
    readers = {"int": lambda x: int(x, 16), "complex": lambda x: complex(*x), "bytes": bytes.fromhex, "object": resolve}
    return readers[kind](body)


class Remote:
    """An object of the program's in the tests' process. It can be called, gone through, and its attributes are there;
    it equals nothing but itself, and has no operators whose result the program could make up."""

    def __init__(self, index, ask):
        vars(self).update(index=index, ask=ask)

    def __call__(self, *args, **kwargs):
        return self.ask("call", self.index, args, kwargs)

    def __iter__(self):
        return iter(self.ask("iterate", self.index))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.ask("get", self.index, (name,))

    def __setattr__(self, name, value):
        self.ask("set", self.index, (name, value))
