"""What stands in for the names in a file: functions of ours for those that it calls, and plain values."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from beit_dist.weights.safe_pickle.tensors import (
    DTYPES,
    Name,
    RefusalError,
    rebuild_parameter,
    rebuild_tensor,
    size_of,
)

_MOST_KEY = 2**60
_LONGEST_KEY = 8
_NUMBERS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
            "f2": "e", "f4": "f", "f8": "d"}  # fmt: skip
"""NumPy's types of one number, as ``struct`` calls them."""


@dataclass(frozen=True)
class NumberType:
    """The type of a NumPy number, which the original's optimizer states have for learning rates."""

    code: str


def checked_key(value: Any) -> Any:
    """A key of a dict or member of a set: a plain value, or a short tuple of texts.

    Python hashes texts with a secret of the process, and small integers as themselves. Of larger integers, and of
    tuples of numbers, a file could hold any number with one hash, and keep the process busy for hours. So could a
    long tuple, which is hashed anew whenever it is used.
    """
    if isinstance(value, tuple):
        fits = len(value) <= _LONGEST_KEY and all(type(part) is str for part in value)
    elif type(value) is int:
        fits = abs(value) < _MOST_KEY
    else:
        fits = value is None or type(value) in (str, float, bool, bytes)
    if not fits:
        raise RefusalError("got a key that is not a plain value")
    return value


def pairs(values: Sequence[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn."""
    return {checked_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return {checked_key(key): value for key, value in items}


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusalError("got bytes in an encoding other than latin1")
    return text.encode("latin1")


def _device(kind: Any, index: Any = None) -> str:
    """A device is only ever named."""
    if not isinstance(kind, str) or not (index is None or type(index) is int):
        raise RefusalError("got a device without a name")
    return kind


def _number_type(code: Any, *_: Any) -> NumberType:
    if not isinstance(code, str) or code not in _NUMBERS:
        raise RefusalError("got an array of something other than numbers")
    return NumberType(code)


def _number(kind: Any, raw: Any) -> bool | int | float:
    """A number of NumPy's becomes one of Python's."""
    if not isinstance(kind, NumberType) or not isinstance(raw, bytes):
        raise RefusalError("got a number without type and bytes")
    (value,) = struct.unpack(f"<{_NUMBERS[kind.code]}", raw)
    found: bool | int | float = value
    return found


BUILDERS: dict[Name, Callable[..., Any]] = {  # each checks its arguments: they are the file's
    Name("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    Name("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    Name("torch", "Size"): lambda sizes=(): tuple(map(size_of, sizes)),
    Name("torch", "device"): _device,
    Name("collections", "OrderedDict"): _ordered,
    Name("builtins", "set"): lambda values=(): set(map(checked_key, values)),
    Name("builtins", "frozenset"): lambda values=(): frozenset(map(checked_key, values)),
    Name("_codecs", "encode"): _encode,
    Name("numpy", "dtype"): _number_type,
    Name("numpy._core.multiarray", "scalar"): _number,
}
"""What is called in place of a name."""

CONSTANTS = {Name("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES.values()}
"""Names that are values, not calls."""
