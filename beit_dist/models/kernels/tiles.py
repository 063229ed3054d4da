"""How the work of the attention kernel is cut up: a small table, instead of trials at every start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel takes at a time, and by how many warps."""

    rows: int
    """Queries."""
    columns: int
    """Keys."""
    warps: int
    stages: int
    """Iterations of the inner loop whose loads are under way; fewer where shared memory does not hold them."""


@dataclass(frozen=True)
class Tiles:
    """A tile for each kernel of :mod:`beit_dist.models.kernels.programs`."""

    forward: Tile
    queries: Tile
    keys: Tile
    bias: Tile


# Triton's compiler says without a GPU what each would need (tests/models/kernels/test_compiled.py): these keep all
# values in registers on compute capability 8.0 and 9.0. Tiles of 128 halve what is read again from the L2 cache,
# which is what limits short sequences; narrow ones across leave less of a row of 197 empty (224, not 256), and
# registers for a second program on the multiprocessor.
_NARROW = Tiles(
    forward=Tile(rows=128, columns=32, warps=8, stages=2),
    queries=Tile(rows=128, columns=32, warps=8, stages=2),
    keys=Tile(rows=32, columns=128, warps=8, stages=2),
    bias=Tile(rows=128, columns=64, warps=8, stages=2),
)
_WIDE = Tiles(
    forward=Tile(rows=128, columns=32, warps=8, stages=2),
    queries=Tile(rows=128, columns=32, warps=8, stages=2),
    keys=Tile(rows=32, columns=64, warps=4, stages=2),
    bias=Tile(rows=128, columns=32, warps=8, stages=2),
)
_FP32 = Tiles(*4 * [Tile(rows=32, columns=32, warps=8, stages=1)])

_in_place: list[Tiles] = []


def tiles_of(width: int, size: int) -> Tiles:
    """The tiles for heads of ``width`` values, a power of two, of ``size`` bytes each."""
    if _in_place:
        return _in_place[-1]
    if size > 2:
        return _FP32
    return _NARROW if width <= 64 else _WIDE


@contextlib.contextmanager
def tiles_in_place(tiles: Tiles) -> Iterator[None]:
    """Have every kernel that is launched inside take other tiles: for benchmarks and tests."""
    _in_place.append(tiles)
    try:
        yield
    finally:
        _in_place.pop()
