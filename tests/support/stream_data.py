"""A tiny data set and what the trainer makes of it, for the tests of the stream."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.pretraining import LoaderConfig
from beit_dist.draws import Purpose, uniforms, words
from beit_dist.shards.manifest import Manifest
from beit_dist.storage.access import Access
from beit_dist.stream import batches as stream
from beit_dist.stream.batches import RankBatches
from beit_dist.stream.masking.modes import masks_of
from beit_dist.stream.plan import Plan

RATES = (0.0, 0.3, 0.6)
FIELDS = ("patches", "tokens", "positions", "keeps", "sample_ids", "epochs")
Rows = dict[str, NDArray[Any]]


class DataSet:
    """A tiny data set and what the trainer would make of it."""

    def __init__(self, root: Path, manifest: Manifest, **plan: Any) -> None:
        self.root, self.manifest, self.where = root, manifest, str(root)
        self.shards = [shard.samples for shard in manifest.view_shards(0)]
        self.plan = Plan(**{"shard_samples": self.shards, "views": manifest.views, "seed": 5, "lanes": 4, **plan})
        self.masks = masks_of(MaskingConfig(mode="original", masked_patches=6, min_block=3), 4, 5)

    def at(self, url: str) -> DataSet:
        """The same data set, read from a URL."""
        other = copy(self)
        other.where = url
        return other

    def batches(
        self,
        *,
        rank: int = 0,
        world: int = 1,
        consumed: int = 0,
        batch: int = 8,
        access: Access | None = None,
        **loader: Any,
    ) -> RankBatches:
        return RankBatches(
            root=self.where,
            manifest=self.manifest,
            plan=self.plan,
            masks=self.masks,
            drop_path_rates=RATES,
            global_batch=batch,
            rank=rank,
            world=world,
            consumed=consumed,
            loader=LoaderConfig(**{"workers": 0, "timeout_seconds": 60, **loader}),
            access=access,
        )

    def take(self, steps: int, **settings: Any) -> list[Rows]:
        """Copies of the first ``steps`` batches of one rank."""
        batches = self.batches(**settings)
        try:
            return [copied(next(batches)) for _ in range(steps)]
        finally:
            batches.close()

    def stored(self, consumed: int, batch: int) -> Rows:
        """A global batch as it is defined, read by hand."""
        layout, plan = self.manifest.layout, self.plan
        picks = plan.picks(consumed, batch // plan.lanes, range(batch))
        rows: dict[str, list[Any]] = {field: [] for field in FIELDS}
        for view, shard, row, epoch in zip(picks.views, picks.shards, picks.rows, picks.epochs, strict=True):
            raw = (self.root / self.manifest.view_shards(int(view))[shard].name).read_bytes()
            sample = raw[row * layout.stride : (row + 1) * layout.stride]
            sample_id = int(sample[: sample.index(b".json")].split(b"-")[1])
            patches = sample[layout.patches_start :][: layout.patches_nbytes]
            rows["patches"].append(np.frombuffer(patches, np.uint8).reshape(layout.patches, -1))
            tokens = sample[layout.tokens_start :][: layout.tokens_nbytes]
            rows["tokens"].append(np.frombuffer(tokens, "<i2"))
            rows["positions"].append(self.masks.positions(int(epoch), sample_id))
            drawn = uniforms(words(5, Purpose.DROP_PATH, (int(epoch), sample_id), 6)).reshape(3, 2)
            rows["keeps"].append(drawn >= np.array(RATES)[:, None])
            rows["sample_ids"].append(sample_id)
            rows["epochs"].append(epoch)
        return {field: np.array(values) for field, values in rows.items()}


def copied(batch: stream.RankBatch) -> Rows:
    return {field: getattr(batch, field).numpy().copy() for field in FIELDS}


def advance(batches: RankBatches, steps: int) -> None:
    for _ in range(steps):
        next(batches)


def joined(ranks: list[Rows]) -> Rows:
    return {field: np.concatenate([rows[field] for rows in ranks]) for field in FIELDS}


def assert_equal(got: Rows, expected: Rows) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(got[field], expected[field], err_msg=field)
