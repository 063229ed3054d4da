"""An interpreter of pickles that calls nothing that they name.

The standard library splits a pickle into instructions (``pickletools``); what each one does is written here, so
that there is nothing to be overlooked in what an unpickler would do besides. ``torch.save`` writes protocol 2;
instructions that only protocols 0 and 1 have are refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NoReturn

from beit_dist.weights.safe_pickle.builders import BUILDERS, CONSTANTS, NumberType, checked_key, pairs
from beit_dist.weights.safe_pickle.tensors import DTYPES, Name, RefusalError, Storages

Admit = Callable[[str, str], bool]
"""Whether the class of this module and name may be in the file, as an :class:`Inert`."""


_STORAGES = {Name("torch", storage) for storage in DTYPES}
_INERT = {
    Name("argparse", "Namespace"),  # the settings beside the weights in files of unilm and many others
    Name("pathlib", "PosixPath"),
    Name("pathlib._local", "PosixPath"),
}
_SIZED = (list, tuple, dict, set, frozenset, str, bytes)
_FREE_COPIES = 4096
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy.core.multiarray": "numpy._core.multiarray"}
"""Modules that Python 2 and NumPy 1 called otherwise."""


@dataclass(eq=False)
class Inert:
    """An object of an admitted class, without the class.

    Attributes:
        kind: what the object was.
        arguments: what it would have been called or created with.
        state: its attributes, usually a dict; None if the file sets none.
    """

    kind: Name
    arguments: tuple[Any, ...] = ()
    state: Any = None


@dataclass
class Machine:
    """Runs one pickle up to its end. Calls nothing but functions of this package.

    Args:
        file: stands at the pickle's start, and afterwards behind its end.
        storages: the tensors' storages; None where there can be none.
        admit: classes that may become :class:`Inert`.
    """

    file: BinaryIO
    storages: Storages | None
    admit: Admit
    stack: list[Any] = field(default_factory=list)
    outer: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    place: int = 0
    """Bytes of the file that have been read."""
    copied: int = 0
    """Values that calls have copied."""

    def run(self) -> Any:
        """The object that the pickle ends with."""
        for opcode, argument, place in pickletools.genops(self.file):
            self.place = place or 0
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _PUSHING:
                self.stack.append(argument)
            elif (action := _ACTIONS.get(opcode.name)) is not None:
                action(self, argument)
            else:
                raise RefusalError(f"got the instruction {opcode.name}, which files of torch.save do not need")
        raise EOFError("it has no end")

    def items(self) -> list[Any]:
        """What lies above the last mark."""
        found, self.stack = self.stack, self.outer.pop()
        return found

    def mark(self, _: Any) -> None:
        """Begin a row of items."""
        self.outer.append(self.stack)
        self.stack = []

    def put(self, index: int | None) -> None:
        """Remember the top of the stack under a number."""
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Lay what is remembered on the stack again."""
        self.stack.append(self.memo[index])

    def push(self, value: Any) -> None:
        """Lay a value on the stack."""
        self.stack.append(value)

    def last(self, count: int) -> list[Any]:
        """Take ``count`` values off the stack."""
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def append(self, values: Sequence[Any]) -> None:
        """Add to the list on the stack."""
        _expect(self.stack[-1], list).extend(values)

    def add(self, values: Sequence[Any]) -> None:
        """Add to the set on the stack."""
        _expect(self.stack[-1], set).update(map(checked_key, values))

    def set_items(self, values: Sequence[Any]) -> None:
        """Add keys and values, in turn, to the dict on the stack."""
        _expect(self.stack[-1], dict).update(pairs(values))

    def name(self, module: Any, name: Any) -> None:
        """Lay a name on the stack, if it is one that may be there at all."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusalError("got a name that is not text")
        found = Name(_RENAMED.get(module, module), name)
        if found in CONSTANTS:
            self.stack.append(CONSTANTS[found])
        elif found in BUILDERS or found in _STORAGES or self.is_inert(found):
            self.stack.append(found)
        else:
            _no_call(found)

    def is_inert(self, name: Name) -> bool:
        """Whether objects of this class may be in the file."""
        return name in _INERT or bool(self.admit(name.module, name.name))

    def reduce(self, called: Any, arguments: Any) -> None:
        """A call, or the creation of an object: what we have in place of that name, or an inert object."""
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise RefusalError(f"it asks to call a {type(called).__name__}; nothing of it was run")
        if called in BUILDERS:
            self._count_copies(arguments)
            self.stack.append(BUILDERS[called](*arguments))
        elif self.is_inert(called):
            self.stack.append(Inert(called, arguments))
        else:
            _no_call(called)

    def _count_copies(self, arguments: tuple[Any, ...]) -> None:
        """Refuse a file that has its values copied over and over: memory is bounded by the file's length.

        What a pickler writes is handed to a call once, and takes at least a byte for each value.
        """
        self.copied += sum(len(value) for value in arguments if isinstance(value, _SIZED))
        if self.copied > _FREE_COPIES + 4 * self.place:
            raise RefusalError("it would unfold to much more than the file holds")

    def build(self, state: Any) -> None:
        """Attributes: kept by inert objects; those of an OrderedDict (``_metadata``) are left out."""
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, NumberType) and isinstance(state, tuple):
            if state[1:2] == (">",):
                raise RefusalError("got big-endian values, expected little-endian ones")
        elif not isinstance(target, dict):
            raise RefusalError(f"it asks to set attributes of a {type(target).__name__}; nothing of it was run")

    def persistent(self, given: Any) -> None:
        """Lay a storage on the stack, or the class of an old file's ('module', class, file, source text)."""
        if isinstance(given, tuple) and len(given) == 4 and given[0] == "module":
            self.stack.append(given[1])
        elif self.storages is None:
            raise RefusalError("got a persistent id where none is allowed")
        else:
            self.stack.append(self.storages.find(given))


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise RefusalError(f"it asks to add to a {type(value).__name__} as if it were a {kind.__name__}")
    return value


def _no_call(name: Name) -> NoReturn:
    raise RefusalError(
        f"it asks for {str(name)!a}, which loading weights does not need; nothing of it was run. "
        "If the file is your own, save the state dict alone"
    )


_VALUES = """BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE
BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"""
_PUSHING = frozenset(_VALUES.split())
"""Instructions whose argument is the value."""


def _push(make: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.push(make())


_ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": Machine.mark,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.items(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Machine.get),
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_TUPLE": _push(tuple),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "EMPTY_SET": _push(set),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.items())),
    "FROZENSET": lambda machine, _: machine.push(frozenset(map(checked_key, machine.items()))),
    "APPEND": lambda machine, _: machine.append(machine.last(1)),
    "APPENDS": lambda machine, _: machine.append(machine.items()),
    "ADDITEMS": lambda machine, _: machine.add(machine.items()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.items()),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.last(2)),
    "REDUCE": lambda machine, _: machine.reduce(*machine.last(2)),
    "NEWOBJ": lambda machine, _: machine.reduce(*machine.last(2)),
    "BUILD": lambda machine, _: machine.build(machine.last(1)[0]),
    "BINPERSID": lambda machine, _: machine.persistent(machine.last(1)[0]),
}
