"""Tensors of a file of ``torch.save``: storages found once, views that lie inside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST_SIZE = 2**40
_MOST_DIMENSIONS = 16

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Storage classes of ``torch`` and the type of their values."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names: two words, not what they stand for."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class RefusalError(Exception):
    """Why a file is not read; becomes a :class:`WeightsError` that names it."""


@dataclass(eq=False)
class Storage:
    """The values that tensors are views of; at first of no content in old files, where they come last."""

    values: Tensor


class Storages:
    """The file's storages by key, each loaded once."""

    def __init__(self, load: Callable[[str, torch.dtype, int], Tensor]) -> None:
        self._load = load
        self.whole: dict[str, Storage] = {}
        self._parts: dict[tuple[str, str], Storage] = {}

    def find(self, given: Any) -> Storage:
        """The storage of a persistent id: ('storage', type, key, device, values[, (key, offset, values)])."""
        if not isinstance(given, tuple) or len(given) not in (5, 6) or given[0] != "storage":
            raise RefusalError("got a persistent id that is not a storage")
        _, kind, key, _, count, part = given if len(given) == 6 else (*given, None)
        if not isinstance(kind, Name) or kind.module != "torch" or kind.name not in DTYPES:
            got = kind if isinstance(kind, Name) else type(kind).__name__
            raise RefusalError(f"got a storage of type {got}, expected one of {', '.join(DTYPES)}")
        if not isinstance(key, str):
            raise RefusalError("got a storage whose key is not text")
        dtype, count = DTYPES[kind.name], size_of(count)
        if key not in self.whole:
            self.whole[key] = Storage(self._load(key, dtype, count))
        whole = self.whole[key]
        if whole.values.dtype is not dtype or len(whole.values) != count:
            raise RefusalError(f"storage {key} is used with two types or sizes")
        if part is None:
            return whole
        if not isinstance(part, tuple) or len(part) != 3 or not isinstance(part[0], str):
            raise RefusalError(f"got a part of storage {key} without key, offset and size")
        name, start, length = part
        end = size_of(start) + size_of(length)
        if end > count:
            raise RefusalError(f"a part of storage {key} reaches beyond it")
        return self._parts.setdefault((key, name), Storage(whole.values[start:end]))


def size_of(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST_SIZE:
        raise RefusalError("got an invalid size")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """A view of a storage that lies inside it and does not unfold to more values than it has."""
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise RefusalError("got a tensor without storage, size and stride")
    sizes, strides, values = [size_of(s) for s in size], [size_of(s) for s in stride], storage.values
    if len(sizes) != len(strides) or len(sizes) > _MOST_DIMENSIONS:
        raise RefusalError("got a tensor whose size and stride differ in length")
    last = size_of(offset) + sum((s - 1) * step for s, step in zip(sizes, strides, strict=True))
    if math.prod(sizes) and (last >= len(values) or math.prod(sizes) > len(values)):
        raise RefusalError(f"got a tensor of size {sizes}, stride {strides} in a storage of {len(values)} values")
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=values.dtype)
    # Of a single value torch takes any stride, and then cannot look at its bytes.
    strides = [1 if s == 1 else step for s, step in zip(sizes, strides, strict=True)]
    return values.as_strided(sizes, strides, values.storage_offset() + offset)  # a part has one of its own


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """``rebuild_tensor_v2`` has requires_grad, hooks and metadata besides: of no use to who reads weights."""
    return _tensor(storage, offset, size, stride)


def rebuild_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise RefusalError("got a parameter that is not a tensor")
    return data
