"""What a loader process reads next is on its way before it is needed; the order of samples says what that is.

Blocks of each lane by default: the window that the lane reads and the one after it. Where these do not fit into
memory, the samples of a part and of the next one, which takes many more requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from beit_dist.stream.fetching import Extent, RemoteReader
from beit_dist.stream.plan import Piece, Plan, Window

Locate = Callable[[Piece], Extent]
"""From samples in the plan's terms to bytes of a shard."""


def lanes_of(rows: range, per_lane: int) -> range:
    """The lanes that rows of the global batch belong to."""
    return range(rows.start // per_lane, (rows.stop - 1) // per_lane + 1)


def ring_bytes(*, lanes: int, window_blocks: int, block_samples: int, stride: int) -> int:
    """Bytes that the blocks of so many lanes take: the window of each that is read, and the one after it."""
    return lanes * 2 * window_blocks * block_samples * stride


class Lookahead(Protocol):
    """Tells a reader what to hold."""

    def begin(self, consumed: int) -> None:
        """The part at this position is read next."""

    def reach(self, lane: int, position: int) -> None:
        """The sample at this position of a lane is read next."""

    def close(self) -> None:
        """Nothing more is read: let go of everything."""


MakeLookahead = Callable[[RemoteReader, Plan, Locate, range, int], Lookahead]
"""From the arguments of :class:`BlocksAhead`."""


class BlocksAhead:
    """Holds two windows of each lane.

    Args:
        reader: is told.
        plan: the order of samples.
        locate: from pieces to bytes.
        rows: of the global batch, that are read.
        per_lane: samples of each lane in a batch.
    """

    def __init__(self, reader: RemoteReader, plan: Plan, locate: Locate, rows: range, per_lane: int) -> None:
        self._reader, self._plan, self._locate = reader, plan, locate
        self._rows, self._per_lane = rows, per_lane
        self._windows: dict[int, deque[Window]] = {lane: deque() for lane in lanes_of(rows, per_lane)}

    def begin(self, consumed: int) -> None:
        for count in (1, 2):  # what is needed first is fetched first
            for lane in self._windows:
                first = max(0, self._rows.start - lane * self._per_lane)
                self._advance(lane, consumed + first, count)

    def reach(self, lane: int, position: int) -> None:
        self._advance(lane, position, 2)

    def close(self) -> None:
        for windows in self._windows.values():
            while windows:
                self._release(windows.popleft())

    def _advance(self, lane: int, position: int, count: int) -> None:
        windows = self._windows[lane]
        while windows and position >= windows[0].end:
            self._release(windows.popleft())
        while len(windows) < count:
            window = self._plan.window(lane, windows[-1].end if windows else position)
            for piece in window.pieces:
                self._reader.hold(self._locate(piece))
            windows.append(window)

    def _release(self, window: Window) -> None:
        for piece in window.pieces:
            self._reader.release(self._locate(piece))


class SamplesAhead:
    """Holds the samples of a part and of the next; arguments are those of :class:`BlocksAhead`."""

    def __init__(self, reader: RemoteReader, plan: Plan, locate: Locate, rows: range, per_lane: int) -> None:
        self._reader, self._plan, self._locate = reader, plan, locate
        self._rows, self._per_lane = rows, per_lane
        self._parts: deque[tuple[int, list[Extent]]] = deque()

    def begin(self, consumed: int) -> None:
        while self._parts and self._parts[0][0] < consumed:
            self._release(self._parts.popleft()[1])
        while len(self._parts) < 2:
            position = self._parts[-1][0] + self._per_lane if self._parts else consumed
            extents = list(self._extents(position))
            for extent in extents:
                self._reader.hold(extent)
            self._parts.append((position, extents))

    def reach(self, lane: int, position: int) -> None:
        """Nothing: the whole part is held."""

    def close(self) -> None:
        while self._parts:
            self._release(self._parts.popleft()[1])

    def _extents(self, consumed: int) -> Iterator[Extent]:
        picks = self._plan.picks(consumed, self._per_lane, self._rows)
        numbers = zip(picks.views.tolist(), picks.shards.tolist(), picks.rows.tolist(), strict=True)
        for view, shard, row in numbers:
            yield self._locate(Piece(view, shard, row, 1))

    def _release(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            self._reader.release(extent)
