"""The loader: samples a second from local shards, against webdataset and a bare read of the same files."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from beit_dist.benches.made_shards import LAYOUT, write_shards
from beit_dist.benches.measuring import Row, in_turn, row
from beit_dist.benches.photos import write_photos
from beit_dist.config.masking import MaskingConfig
from beit_dist.config.pretraining import LoaderConfig
from beit_dist.images.decoding import crop_box
from beit_dist.shards.manifest import Manifest
from beit_dist.storage.checksums import crc32
from beit_dist.stream.batches import RankBatches
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.masking.modes import masks_of
from beit_dist.stream.masking.released import ExactMasks
from beit_dist.stream.pipeline import PartPipeline
from beit_dist.stream.plan import Plan
from beit_dist.stream.readers import open_reader

_TAKEN = 2000  # samples a second, about what one GPU trains base on


def measure(quick: bool) -> list[Row]:
    """One thread into reused memory, and through worker processes into the trainer's batches."""
    shards, per_shard, batch = (2, 128, 64) if quick else (8, 256, 128)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_shards(Path(folder), shards, per_shard)
        samples = manifest.samples
        masked, read = (_pipeline(folder, manifest, batch, masks) for masks in (_masks(), _NoMasks()))
        work = {
            "ours: read, crc32, masks": lambda: [next(masked) for _ in range(samples // batch)],
            "ours: read, crc32": lambda: [next(read) for _ in range(samples // batch)],
            "copy and crc32, nothing else": _floor(folder, manifest, batch),
            "webdataset, decoded": lambda: _webdataset(folder, manifest, batch),
            "read of the tar": lambda: _bare_read(folder, manifest),
        }
        # The files are in the page cache, so nothing waits for a disk, and other programs must not count.
        rates = in_turn(work, 3 if quick else 7, clock=time.process_time)
        unit = "samples/CPU s"
        rows = [row("loader", "into memory", w, [samples / t for t in ts], unit) for w, ts in rates.items()]
        rows.append(_from_jpegs(Path(folder), 32 if quick else 256))
        for workers in (0, 1, 2):
            rows.append(_through_workers(folder, manifest, batch, workers, 2 if quick else 4))
        rows.append(_waits(folder, manifest, batch, 50 if quick else 400))
    return rows


def _plan(manifest: Manifest, batch: int) -> Plan:
    sizes = [shard.samples for shard in manifest.view_shards(0)]
    return Plan(shard_samples=sizes, views=1, seed=0, lanes=batch // 8)


def _masks() -> Masks:
    return masks_of(MaskingConfig(masked_patches=75), 14, 0)


class _NoMasks(ExactMasks):
    """The same patches for all, which cost nothing."""

    def __init__(self) -> None:
        super().__init__(MaskingConfig(masked_patches=75), 14, 0)
        self._same = super().positions_of([0], [0])

    def positions_of(self, epochs: Any, sample_ids: Any) -> Any:
        return np.broadcast_to(self._same, (len(epochs), self.positions_per_image))


def _pipeline(folder: str, manifest: Manifest, batch: int, masks: Masks) -> Iterator[object]:
    """Plan, read, checksum and masks in this thread, into one piece of memory, batch after batch."""
    plan = _plan(manifest, batch)
    return iter(
        PartPipeline(
            reader=open_reader(folder),
            manifest=manifest,
            plan=plan,
            masks=masks,
            drop_path_rates=[0.0] * 12,
            parts=[range(batch)],
            per_lane=batch // plan.lanes,
            consumed=0,
            slots=1,
            tolerant=False,
        )
    )


def _floor(folder: str, manifest: Manifest, batch: int) -> Callable[[], None]:
    """What no reader that checks can do without: each sample's patches are copied, and their crc32 computed.

    From a map of the files, which the loader cannot afford: a file that is cut short would end the process.
    """
    target = np.empty((batch, LAYOUT.patches_nbytes), np.uint8)
    start, stop = LAYOUT.patches_start, LAYOUT.patches_start + LAYOUT.patches_nbytes
    maps = [np.memmap(Path(folder) / shard.name, np.uint8, "r") for shard in manifest.shards]
    whole = [file[: len(file) // LAYOUT.stride * LAYOUT.stride].reshape(-1, LAYOUT.stride) for file in maps]

    def copy_all() -> None:
        for samples in whole:
            for number, sample in enumerate(samples[:, start:stop]):
                row = target[number % batch]
                row[:] = sample
                crc32(row.data)

    return copy_all


def _read_anew(path: Path) -> None:
    """Have a file in the page cache as reading leaves it: small writes leave small pages, slow to copy from."""
    with path.open("rb+", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 20):
            pass


def _webdataset(folder: str, manifest: Manifest, batch: int) -> None:
    """The same tensors as a user of plain webdataset would make them, without checksums and masks."""
    urls = [str(Path(folder) / shard.name) for shard in manifest.shards]
    patches = np.empty((batch, LAYOUT.patches, LAYOUT.patch_bytes), np.uint8)
    tokens = np.empty((batch, LAYOUT.grid, LAYOUT.grid), np.int16)
    for number, sample in enumerate(wds.WebDataset(urls, shardshuffle=False)):
        patches[number % batch] = np.load(io.BytesIO(sample["patches.npy"]))
        tokens[number % batch] = np.load(io.BytesIO(sample["tokens.npy"]))


def _bare_read(folder: str, manifest: Manifest) -> None:
    buffer = bytearray(1 << 20)
    for shard in manifest.shards:
        with (Path(folder) / shard.name).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _from_jpegs(folder: Path, count: int) -> Row:
    """What training without shards does for each image: decode, crop, resize; no jitter, second view or tokens."""
    files = [file.read_bytes() for file in write_photos(folder / "jpegs", count)]
    batch = np.empty((len(files), 224, 224, 3), np.uint8)

    def decode_all() -> None:
        for number, raw in enumerate(files):
            with Image.open(io.BytesIO(raw)) as image:
                box = crop_box(image.width, image.height, 0, (number, 0))
                batch[number] = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=box)

    times = in_turn({"ours": decode_all}, 3, clock=time.process_time)["ours"]
    return row("loader", "into memory", "JPEGs decoded", [count / t for t in times], "samples/CPU s")


def _waits(folder: str, manifest: Manifest, batch: int, steps: int) -> Row:
    """A trainer that takes 2,000 samples a second, and computes nothing: the share of a step it waits for data."""
    batches = _batches(folder, manifest, batch, workers=1)
    step_seconds = batch / _TAKEN
    shares = []
    try:
        for _ in range(10):
            next(batches)
        for _ in range(4):
            waited = 0.0
            for _ in range(steps // 4):
                waited += next(batches).wait_seconds
                time.sleep(step_seconds)
            shares.append(100 * waited / (steps // 4 * step_seconds))
    finally:
        batches.close()
    return row("loader", f"wait at {_TAKEN:,} samples/s", "ours, 1 worker", shares, "% of a step")


def _through_workers(folder: str, manifest: Manifest, batch: int, workers: int, repetitions: int) -> Row:
    batches = _batches(folder, manifest, batch, workers)
    steps = manifest.samples // batch

    def epoch() -> None:
        for _ in range(steps):
            next(batches)

    try:
        rates = [manifest.samples / t for t in in_turn({"ours": epoch}, repetitions)["ours"]]
    finally:
        batches.close()
    return row("loader", f"into batches, {workers} workers", "ours", rates, "samples/s")


def _batches(folder: str, manifest: Manifest, batch: int, workers: int) -> RankBatches:
    return RankBatches(
        root=folder,
        manifest=manifest,
        plan=_plan(manifest, batch),
        masks=_masks(),
        drop_path_rates=[0.0] * 12,
        global_batch=batch,
        rank=0,
        world=1,
        consumed=0,
        loader=LoaderConfig(workers=workers),
    )
