"""From a position in the plan to a part of a batch: read, check, mask. This is what loader workers run.

Stage 0 yields work items for ever; the stages behind it fill one part each: consecutive rows of a rank's batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beit_dist.errors import DataError, MissingShardError, SampleError
from beit_dist.shards.manifest import Manifest
from beit_dist.shards.sample import SampleLayout, checked_sample_id
from beit_dist.stream import counts
from beit_dist.stream.fetching import Extent, RemoteReader
from beit_dist.stream.lookahead import Lookahead, MakeLookahead
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.parts import DropPath, MemoryLayout, Part, Parts, Shapes, drop_path_depth
from beit_dist.stream.plan import Piece, Plan
from beit_dist.stream.readers import ShardReader


class RowLayout(MemoryLayout):
    """Where the arrays of ``rows`` samples of a shard lie.

    Args:
        sample: shapes of patches and tokens.
        positions: K, the length of a row of masked positions.
        depth: blocks with drop-path keeps; 0 leaves them out.
        rows: samples.
    """

    def __init__(self, sample: SampleLayout, positions: int, depth: int, rows: int) -> None:
        shapes: Shapes = {
            "patches": (torch.uint8, (rows, sample.patches, sample.patch_bytes)),
            "tokens": (torch.int16, (rows, sample.patches)),
            "positions": (torch.int16, (rows, positions)),
            "sample_ids": (torch.int64, (rows,)),
            "epochs": (torch.int32, (rows,)),
        }
        super().__init__({**shapes, "keeps": (torch.uint8, (rows, depth, 2))} if depth else shapes)


def split_rows(rows: range, per_lane: int, parts: int) -> list[range]:
    """Cut a rank's rows into at most ``parts`` consecutive ranges of whole lanes, as even as lanes allow."""
    first, last = rows.start // per_lane, (rows.stop - 1) // per_lane + 1
    parts = min(parts, last - first)
    edges = [(first + (last - first) * part // parts) * per_lane for part in range(parts + 1)]
    edges[0], edges[-1] = rows.start, rows.stop
    return [range(edges[part], edges[part + 1]) for part in range(parts)]


class PartPipeline(Parts):
    """Parts made of shards. The position is the number of samples of each lane that were consumed.

    Args:
        reader: reads the shards.
        manifest: names and layout of the shards.
        plan: the order of samples.
        masks: makes the masked positions.
        drop_path_rates: stochastic-depth rate of each block; all zero leaves out the keeps.
        parts: the rows of the global batch that each worker fills.
        per_lane: samples of each lane in a batch.
        consumed: where to begin.
        slots: see :class:`Parts`.
        tolerant: carry damaged samples with weight 0, and report them, instead of failing at the first.
        ahead: what a reader that can hold samples is told to hold.
    """

    def __init__(
        self,
        *,
        reader: ShardReader,
        manifest: Manifest,
        plan: Plan,
        masks: Masks,
        drop_path_rates: Sequence[float],
        parts: Sequence[range],
        per_lane: int,
        consumed: int,
        slots: int,
        tolerant: bool,
        ahead: MakeLookahead | None = None,
    ) -> None:
        super().__init__(
            self._read, self._mask, self._keep, parts=parts, advance=per_lane, consumed=consumed, slots=slots
        )
        self.reader, self.plan, self.masks, self.tolerant = reader, plan, masks, tolerant
        self.per_lane = per_lane
        self.drop_path = DropPath(plan.seed, drop_path_rates)
        self.depth = drop_path_depth(drop_path_rates)
        self.shard_names = [[shard.name for shard in manifest.view_shards(v)] for v in range(manifest.views)]
        self.sample = manifest.layout
        self.ahead = ahead
        self._layouts: dict[int, RowLayout] = {}
        self._ahead: Lookahead | None = None

    def layout(self, rows: int) -> RowLayout:
        """How a part of so many rows lies in memory."""
        if rows not in self._layouts:
            self._layouts[rows] = RowLayout(self.sample, self.masks.positions_per_image, self.depth, rows)
        return self._layouts[rows]

    def begin(self) -> None:
        """Begin anew to say what is read next, if the reader listens."""
        self._ahead = None
        if self.ahead is not None and isinstance(self.reader, RemoteReader):
            self._ahead = self.ahead(self.reader, self.plan, self._extent, self.rows, self.per_lane)

    def end(self) -> None:
        """Hold nothing more."""
        if self._ahead is not None:
            self._ahead.close()

    # -------------------------------------------------------------------------------------------- the stages

    def _read(self, part: Part) -> Part:
        """Stage 1: patches, tokens and ids of each row, straight from the shards into the part's memory."""
        picks = self.plan.picks(part.consumed, self.per_lane, part.rows)
        arrays = self.arrays(part)
        arrays["epochs"][:] = picks.epochs
        reading, ahead = _Reading(self.reader, self.sample), self._ahead
        patches, patches_size = arrays["patches"].data.cast("B"), self.sample.patches_nbytes
        tokens, tokens_size = arrays["tokens"].data.cast("B"), self.sample.tokens_nbytes
        places = zip(picks.views.tolist(), picks.shards.tolist(), picks.rows.tolist(), strict=True)
        ids = []
        if ahead is not None:
            ahead.begin(part.consumed)
        for row, (view, shard, stored) in enumerate(places):
            if ahead is not None:
                lane, number = divmod(part.rows[row], self.per_lane)
                ahead.reach(lane, part.consumed + number)
            memory = (
                patches[row * patches_size : (row + 1) * patches_size],
                tokens[row * tokens_size : (row + 1) * tokens_size],
            )
            try:
                ids.append(reading.sample(self.shard_names[view][shard], stored, view, *memory))
            except DataError as error:
                if not self.tolerant:
                    raise
                part.faults.append(str(error))
                ids.append(-1)
                arrays["patches"][row], arrays["tokens"][row] = 0, 0
        arrays["sample_ids"][:] = ids
        return part

    def _mask(self, part: Part) -> Part:
        """Stage 2: the masked positions of each row; none where the sample is damaged."""
        arrays = self.arrays(part)
        whole = arrays["sample_ids"] >= 0
        arrays["positions"][whole] = self.masks.positions_of(arrays["epochs"][whole], arrays["sample_ids"][whole])
        arrays["positions"][~whole] = -1
        return part

    def _keep(self, part: Part) -> Part:
        """Stage 3: which residual branches of each block are kept for each row."""
        arrays = self.arrays(part)
        if "keeps" in arrays:
            arrays["keeps"][:] = self.drop_path.keeps(arrays["epochs"], arrays["sample_ids"])
        return part

    def _extent(self, piece: Piece) -> Extent:
        """Where the samples of a piece lie."""
        stride = self.sample.stride
        return Extent(self.shard_names[piece.view][piece.shard], piece.row * stride, piece.rows, stride)


class _Reading:
    """Reads samples with one call each, and checks every byte that training depends on."""

    def __init__(self, reader: ShardReader, layout: SampleLayout) -> None:
        self.reader, self.layout = reader, layout
        # What lies before the patches, and between them and the tokens; the arrays go where they belong.
        self.head = memoryview(bytearray(layout.patches_start))
        between = layout.tokens_start - layout.patches_start - layout.patches_nbytes
        self.between = memoryview(bytearray(between))

    def sample(self, shard: str, row: int, view: int, patches: memoryview, tokens: memoryview) -> int:
        """Read a sample into ``patches`` and ``tokens``; its id. A failed read is repeated once.

        Raises:
            SampleError: naming shard, row, offset and cause, after the second failure.
        """
        try:
            return self._attempt(shard, row, view, patches, tokens)
        except DataError:
            pass  # bytes can be damaged on their way, too
        try:
            sample_id = self._attempt(shard, row, view, patches, tokens, fresh=True)
        except DataError as error:
            counts.read_again.add("damaged")
            if isinstance(error, MissingShardError):
                raise SampleError(
                    f"{error}, also when tried again. Was the data set moved, or is its disk no longer mounted? "
                    "beit check lists all that is missing."
                ) from None
            raise SampleError(
                f"{shard}, sample {row}, byte {row * self.layout.stride}: damaged, also when read again: {error}. "
                "beit check lists all damage. loader.bad_samples=N leaves out up to N such samples."
            ) from None
        counts.read_again.add("whole")
        return sample_id

    def _attempt(
        self, shard: str, row: int, view: int, patches: memoryview, tokens: memoryview, fresh: bool = False
    ) -> int:
        pieces = (self.head, patches, self.between, tokens)
        self.reader.read_into(shard, row * self.layout.stride, pieces, fresh=fresh)
        return checked_sample_id(self.layout, *pieces, view)
