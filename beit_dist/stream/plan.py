"""The order of samples: which sample is trained on at which position, for ever, on any number of ranks.

Epoch ``e`` permutes blocks of consecutive samples and lays them end to end. That stream is cut, in lane order,
into one run for each of L lanes; inside a run, windows of whole block pieces are shuffled. A lane continues from
its run of one epoch to its run of the next, so there is no end, no padding and nothing dropped, and the state
of the whole plan is one integer: the samples consumed per lane.

Lane ``l``'s run in epoch ``e`` has ⌊((e+1)N+l)/L⌋ − ⌊(eN+l)/L⌋ samples, N being the samples of an epoch. The
sums telescope: position ``k`` of lane ``l`` lies in epoch (L(k+1) − l − 1) // N, and the runs of the lanes
before ``l`` have F((e+1)N, l) − F(eN, l) samples, where F(x, l) = Σ_{i<l} ⌊(x+i)/L⌋ = l·⌊x/L⌋ +
max(0, l − (L − x mod L)): the floor rises by one where ``x mod L + i`` reaches L.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit_dist.draws import Purpose, permutation
from beit_dist.errors import CheckpointError, ConfigError, DataError

PLAN_VERSION = 1
"""Raised whenever the same constants would give another order."""

_CACHED_EPOCHS = 2  # lanes turn over at the same position or the next, so a step touches two epochs at most
_DIGEST_ROWS = 4096

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Picks:
    """Where the samples of n rows are stored; four arrays of shape (n,)."""

    epochs: Int32s
    views: Int32s
    shards: Int32s
    """Index of the shard within its view."""
    rows: Int32s
    """Index of the sample within its shard."""


class Piece(NamedTuple):
    """Consecutive samples of a shard."""

    view: int
    shard: int
    """Index within its view."""
    row: int
    """Of the first sample, within the shard."""
    rows: int


class Window(NamedTuple):
    """The pieces of blocks that are shuffled together, which a lane reads from ``begin`` up to ``end``."""

    begin: int
    end: int
    pieces: tuple[Piece, ...]


class _Span(NamedTuple):
    """Where positions of lanes lie in an epoch's stream, and the windows that they lie in; arrays of one shape."""

    place: Int64s
    window: Int64s  # number within the lane's run
    begin: Int64s  # the window's first place
    end: Int64s  # the one behind its last
    piece: Int64s  # its first block, in the epoch's order


@dataclass(frozen=True)
class _EpochOrder:
    """The permuted blocks of an epoch."""

    blocks: Int32s  # (blocks,) block numbers in the epoch's order
    bounds: Int64s  # (blocks + 1,) where each begins in the epoch's stream


class Plan:
    """Maps (position, row of the global batch) to a stored sample.

    Args:
        shard_samples: samples of each shard of a view; the same in every view.
        views: number of views; epoch ``e`` reads view ``e mod views``.
        seed: of the run.
        lanes: L, the number of independent streams; must divide every global batch.
        block_samples: longest run of consecutive samples kept together; by default
            ``min(64, max(1, samples // 16L))``, so that a lane has at least 16 blocks in an epoch if it can.
        window_blocks: block pieces of a lane that are shuffled together.
        dataset_digest: kept among the constants.

    Raises:
        DataError: there are no samples.
        ConfigError: a number is out of range.

    Holds about 12 bytes for each block of each of two epochs, and 4 bytes for each sample of the current
    window of each lane that it is asked for. Copies sent to another process start with empty caches.
    """

    def __init__(
        self,
        *,
        shard_samples: Sequence[int],
        views: int,
        seed: int,
        lanes: int,
        block_samples: int | None = None,
        window_blocks: int = 1,
        dataset_digest: str = "",
    ) -> None:
        sizes = np.asarray(shard_samples, np.int64)
        self.samples = int(sizes.sum())
        if not self.samples:
            raise DataError("the data set has no samples: there were no images, or all were rejected")
        for name, number in (("lanes", lanes), ("window_blocks", window_blocks), ("block_samples", block_samples)):
            if number is not None and number < 1:
                raise ConfigError(f"loader.{name}", number, "a number of at least 1")
        self.views, self.seed, self.lanes, self.window_blocks = views, seed, lanes, window_blocks
        self.block_samples = block_samples or min(64, max(1, self.samples // (16 * lanes)))
        self.dataset_digest = dataset_digest
        blocks_of_shard = -(-sizes // self.block_samples)
        self._sizes = sizes
        self._first_block = np.concatenate([[0], np.cumsum(blocks_of_shard)])
        self.blocks = int(self._first_block[-1])
        if self.blocks >= 2**31:
            raise ConfigError(
                "loader.block_samples",
                self.block_samples,
                f"a number that gives fewer than 2³¹ blocks, not {self.blocks}",
            )
        self._drop_caches()

    def _drop_caches(self) -> None:
        self._orders: dict[int, _EpochOrder] = {}
        self._windows: dict[int, tuple[int, int, Int32s]] = {}  # lane -> epoch, window, its permutation

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}, "_windows": {}}

    # ------------------------------------------------------------------------------------------ the order

    def picks(self, consumed: int, per_lane: int, rows: range) -> Picks:
        """The samples of ``rows`` of the global batch that begins at ``consumed``.

        The global batch is lane-major: row ``i`` is sample ``consumed + i mod per_lane`` of lane
        ``i // per_lane``.

        Args:
            consumed: samples of each lane before this batch.
            per_lane: samples of each lane in a batch.
            rows: consecutive rows within ``range(lanes * per_lane)``.

        Raises:
            ValueError: rows outside the batch, or not consecutive.
        """
        if rows.step != 1 or (len(rows) and not 0 <= rows.start < rows.stop <= self.lanes * per_lane):
            raise ValueError(f"{rows} is not a range of the {self.lanes * per_lane} rows of a global batch")
        index = np.arange(rows.start, rows.stop, dtype=np.int64)
        lanes = index // per_lane
        positions = consumed + index % per_lane
        epochs = (self.lanes * (positions + 1) - lanes - 1) // self.samples
        shards = np.empty(len(index), np.int32)
        shard_rows = np.empty(len(index), np.int32)
        for epoch in np.unique(epochs).tolist():
            chosen = np.flatnonzero(epochs == epoch)
            stream = self._shuffled(epoch, lanes[chosen], positions[chosen])
            shards[chosen], shard_rows[chosen] = self._locate(epoch, stream)
        return Picks(epochs.astype(np.int32), (epochs % self.views).astype(np.int32), shards, shard_rows)

    def window(self, lane: int, position: int) -> Window:
        """What a lane reads around ``position``; the window after it lies around its ``end``."""
        epoch = (self.lanes * (position + 1) - lane - 1) // self.samples
        span = self._span(epoch, np.array([lane]), np.array([position]))
        place, begin, end, first = (int(array[0]) for array in (span.place, span.begin, span.end, span.piece))
        edges = self._order(epoch).bounds[first : first + self.window_blocks + 1]
        low, high = np.maximum(edges[:-1], begin), np.minimum(edges[1:], end)
        filled = low < high
        shards, rows = self._locate(epoch, low[filled])
        numbers = zip(shards.tolist(), rows.tolist(), (high - low)[filled].tolist(), strict=True)
        pieces = tuple(Piece(epoch % self.views, *piece) for piece in numbers)
        return Window(position - place + begin, position - place + end, pieces)

    def _span(self, epoch: int, lanes: Int64s, positions: Int64s) -> _Span:
        bounds = self._order(epoch).bounds
        start = self._runs_before(epoch, lanes)
        stop = self._runs_before(epoch, lanes + 1)
        place = start + positions - (epoch * self.samples + lanes) // self.lanes
        first_piece = np.searchsorted(bounds, start, side="right") - 1
        windows = (np.searchsorted(bounds, place, side="right") - 1 - first_piece) // self.window_blocks
        piece = first_piece + windows * self.window_blocks
        begin = np.maximum(start, bounds[piece])
        end = np.minimum(stop, bounds[np.minimum(piece + self.window_blocks, self.blocks)])
        return _Span(place, windows, begin, end, piece)

    def _shuffled(self, epoch: int, lanes: Int64s, positions: Int64s) -> Int64s:
        """Positions of lanes that lie in ``epoch`` to places in its stream of permuted blocks."""
        place, windows, begin, end, _ = self._span(epoch, lanes, positions)
        # Rows of one window stand together, since rows are lane-major and positions rise within a lane.
        changes = np.flatnonzero((np.diff(lanes) != 0) | (np.diff(windows) != 0)) + 1
        edges = [0, *changes.tolist(), len(lanes)]
        for low, high in itertools.pairwise(edges):
            base = int(begin[low])
            order = self._window(epoch, int(lanes[low]), int(windows[low]), int(end[low]) - base)
            offset = int(place[low]) - base
            place[low:high] = base + order[offset : offset + high - low]
        return place

    def _runs_before(self, epoch: int, lanes: Int64s) -> Int64s:
        """Samples of ``epoch`` that belong to lanes before each of ``lanes``: F((e+1)N, l) − F(eN, l)."""

        def total(x: int) -> Int64s:
            quotient, remainder = divmod(x, self.lanes)
            return lanes * quotient + np.maximum(0, lanes - (self.lanes - remainder))

        return total((epoch + 1) * self.samples) - total(epoch * self.samples)

    def _locate(self, epoch: int, place: Int64s) -> tuple[Int64s, Int64s]:
        """Places in an epoch's stream to (shard, row of the shard)."""
        order = self._order(epoch)
        index = np.searchsorted(order.bounds, place, side="right") - 1
        block = order.blocks[index].astype(np.int64)
        shard = np.searchsorted(self._first_block, block, side="right") - 1
        row = (block - self._first_block[shard]) * self.block_samples + place - order.bounds[index]
        return shard, row

    def _order(self, epoch: int) -> _EpochOrder:
        if epoch not in self._orders:
            while len(self._orders) >= _CACHED_EPOCHS:
                del self._orders[next(iter(self._orders))]
            blocks = permutation(self.seed, Purpose.BLOCK_ORDER, (epoch,), self.blocks).astype(np.int32)
            bounds = np.zeros(self.blocks + 1, np.int64)
            np.cumsum(self._block_lengths()[blocks], out=bounds[1:])
            self._orders[epoch] = _EpochOrder(blocks, bounds)
        return self._orders[epoch]

    def _block_lengths(self) -> Int32s:
        lengths = np.full(self.blocks, self.block_samples, np.int32)
        filled = np.flatnonzero(self._sizes)
        last = self._first_block[filled + 1] - 1
        whole = (self._first_block[filled + 1] - self._first_block[filled] - 1) * self.block_samples
        lengths[last] = self._sizes[filled] - whole
        return lengths

    def _window(self, epoch: int, lane: int, window: int, length: int) -> Int32s:
        kept = self._windows.get(lane)
        if kept is None or kept[:2] != (epoch, window):
            order = permutation(self.seed, Purpose.WINDOW_ORDER, (epoch, lane, window), length)
            kept = self._windows[lane] = (epoch, window, order.astype(np.int32))
        return kept[2]

    # ------------------------------------------------------------------------------- what a run remembers

    def constants(self) -> dict[str, Any]:
        """What must stay the same for the life of a run; plain JSON, kept in every checkpoint."""
        return {
            "version": PLAN_VERSION,
            "dataset_digest": self.dataset_digest,
            "seed": self.seed,
            "lanes": self.lanes,
            "block_samples": self.block_samples,
            "window_blocks": self.window_blocks,
            "samples": self.samples,
            "views": self.views,
            "first_picks": self._first_picks(),
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Compare the constants of a checkpoint with this plan's.

        Raises:
            CheckpointError: naming the first that differs.
        """
        for name, own in self.constants().items():
            if saved.get(name) != own:
                raise CheckpointError(
                    f"plan.{name}: the checkpoint has {saved.get(name)!r}, this run has {own!r}. The order of "
                    f"samples cannot change within a run. {_WAYS_OUT[name]}"
                )

    def _first_picks(self) -> str:
        """sha256 of where the first samples lie: tells apart what the other constants cannot."""
        fresh = Plan.__new__(Plan)
        fresh.__dict__.update(self.__getstate__())  # leave this plan's caches as they are
        fresh._drop_caches()
        picks = fresh.picks(0, 4, range(min(4 * self.lanes, _DIGEST_ROWS)))
        arrays = (picks.epochs, picks.views, picks.shards, picks.rows)
        return hashlib.sha256(b"".join(array.astype("<i4").tobytes() for array in arrays)).hexdigest()


_NEW_RUN = "Start a new run in another folder (init_from takes over the weights)."
_RESTORE = "Set it back, or start a new run in another folder (init_from takes over the weights)."
_WAYS_OUT = {
    "version": "Continue with the version of beit_dist that began the run, or start a new run in another folder.",
    "dataset_digest": f"Set data to the shards that the run began with. {_NEW_RUN}",
    "seed": _RESTORE,
    "lanes": f"Set loader.lanes to the checkpoint's number. {_NEW_RUN}",
    "block_samples": f"Set loader.block_samples to the checkpoint's number. {_NEW_RUN}",
    "window_blocks": f"Set loader.window_blocks to the checkpoint's number. {_NEW_RUN}",
    "samples": _NEW_RUN,
    "views": _NEW_RUN,
    "first_picks": "This installation draws other random numbers than the one that began the run. Continue with "
    "that one.",
}
