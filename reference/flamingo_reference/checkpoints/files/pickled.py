"""What a pickle describes, without running any of it.

A pickle is a program that may import and call anything. Here its instructions are carried out on inert values: a name is a name, a call is
recorded, and nothing is ever imported or called. What is left is enough to find the tensors of a `.pt` file, and to refuse all others.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec


class Name(NamedTuple):
    """A global that the pickle names, such as `torch FloatStorage`; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call(msgspec.Struct, eq=False):
    """A call or construction that the pickle asks for, not carried out; state: what it wants set on the result."""

    what: Name
    arguments: tuple[Any, ...]
    state: Any = None


class Persistent(msgspec.Struct, eq=False):
    """A reference to something outside of the pickle: for torch, a storage."""

    identity: Any


class MalformedPickle(ValueError):
    """Bytes that are not a pickle, or one with instructions that files of tensors do not have."""


class _Mark:
    pass


_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_COLLECTIONS = (*_EMPTY, *_TUPLES, "TUPLE", "LIST", "DICT", "SETITEM", "SETITEMS", "APPEND", "APPENDS")
_ORDERED = Name("collections", "OrderedDict")


def read_pickle(data: bytes) -> Any:
    """The value of the pickle `data`: dicts, lists, tuples, text and numbers as they are, the rest as Name, Call and Persistent.

    An OrderedDict becomes a dict. Raises MalformedPickle, also where a dict is given the same key twice.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except MalformedPickle:
        raise
    except Exception as error:  # an instruction short of operands, text that is not UTF-8, ...
        raise MalformedPickle(f"{type(error).__name__}: {error}") from error
    raise MalformedPickle("it ends before its last instruction")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in (*_NUMBERS, *_TEXTS, *_BYTES):
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(argument)])
        elif name == "GLOBAL":
            stack.append(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not (isinstance(module, str) and isinstance(attribute, str)):
                raise MalformedPickle("it names a global by what is not text")
            stack.append(Name(module, attribute))
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._above_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in _COLLECTIONS:
            self._collection(name)
        else:
            self._object(name, argument)

    def _collection(self, name: str) -> None:
        stack = self.stack
        if name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("TUPLE", "LIST"):
            stack.append((tuple if name == "TUPLE" else list)(self._above_mark()))
        elif name in _TUPLES:
            operands = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(operands)))
        elif name == "DICT":
            items: dict[Any, Any] = {}
            _fill(items, self._above_mark())
            stack.append(items)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self._above_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop(-1)]
            _fill(stack[-1], pairs)
        else:
            more = self._above_mark() if name == "APPENDS" else [stack.pop()]
            if not isinstance(stack[-1], list):
                raise MalformedPickle("it appends to what is not a list")
            stack[-1].extend(more)

    def _object(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("REDUCE", "NEWOBJ"):
            arguments, what = stack.pop(), stack.pop()
            if not isinstance(what, Name) or not isinstance(arguments, tuple):
                raise MalformedPickle("it calls what is not a name")
            stack.append({} if what == _ORDERED and not arguments else Call(what, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Call):
                stack[-1].state = state
            elif not isinstance(stack[-1], dict):  # an OrderedDict's attributes, such as torch's _metadata, are left out
                raise MalformedPickle("it sets attributes of what is not an object")
        elif name == "BINPERSID":
            stack.append(Persistent(stack.pop()))
        elif name == "INST":
            stack.append(Call(Name(*argument.split(" ", 1)), tuple(self._above_mark())))
        elif name == "OBJ":
            what, *rest = self._above_mark()
            if not isinstance(what, Name):
                raise MalformedPickle("it calls what is not a name")
            stack.append(Call(what, tuple(rest)))
        else:
            raise MalformedPickle(f"it has the instruction {name}")

    def _above_mark(self) -> list[Any]:
        stack = self.stack
        place = len(stack) - 1 - stack[::-1].index(_Mark)
        items = stack[place + 1 :]
        del stack[place:]
        return items


def _fill(target: Any, items: Sequence[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise MalformedPickle("it sets items of what is not a dictionary")
    twice = []
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Other keys are not needed, and hashing a tuple may take forever: its parts may be one and the same tuple, level upon level.
        if not isinstance(key, str | int | Call):
            raise MalformedPickle(f"it has a key that is a {type(key).__name__}")
        if key in target:
            twice.append(repr(key))
        target[key] = value
    if twice:
        raise MalformedPickle(f"it gives {', '.join(twice)} twice")
