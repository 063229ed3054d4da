"""How fast each stage of a job is on this machine, measured alone on a few real images, and what limits it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from beit_dist.errors import DataError
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.shards.sample import SampleNotes, sample_key
from beit_dist.shards.statistics import Tally
from beit_dist.shards.writer import ShardWriter
from beit_dist.storage.access import Access
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.place import Place
from beit_dist.tokenizing.decoding import Decoded, Recipe, decode_listed, keep_blocks
from beit_dist.tokenizing.encoder import Encoder
from beit_dist.tokenizing.job import Job
from beit_dist.tokenizing.sources import ListedImage, read_listed

_SECONDS = 1.5
"""That each stage is measured for, at least one image, batch or round of writing."""
_LONG = 5.0
"""Seconds; an encoder that takes so long for its first batch is measured by that, although it is slower."""
_WRITTEN = 256
"""Samples of a view that are written at most, to measure that."""
_PROBE = ".beit-dry-run"


class Stage(NamedTuple):
    """One of the stages that work side by side."""

    name: str
    seconds: float
    """For an image in all views, by one process."""
    processes: float
    """That do it side by side; cores, for what is limited by them."""

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.processes / self.seconds


class Measured(NamedTuple):
    """All stages."""

    stages: tuple[Stage, ...]
    """decode, encode, write; and cores, which share what all of them need of the processor."""
    looked_at: int
    """Images that were decoded."""
    rejected: int
    """Of them."""

    @property
    def limit(self) -> Stage:
        """The slowest, which sets the pace."""
        return min(self.stages, key=lambda stage: stage.rate)


def measure_stages(
    job: Job,
    samples: Sequence[ListedImage],
    encoder: Encoder,
    out: Place,
    *,
    decoders: int,
    encoders: int,
    access: Access,
) -> Measured:
    """Measure each stage alone for a second or two. What is written into the output folder is removed again.

    Args:
        samples: images spread over the list.
        encoder: the job's own.
        out: the output folder, which need not be there yet.
        decoders: decoding processes of this host, all together.
        encoders: encoding processes, which also write.

    Raises:
        DataError: none of the images can be used.
        UserError: the output folder cannot be written.
    """
    decoded, decode = _decode(job, samples, access)
    usable = [one for one in decoded if not one.reason]
    if not usable:
        first = decoded[0]
        raise DataError(f"none of {len(decoded)} images can be used ({first.listed.name}: {first.reason})")
    encode, write = _encode(job, usable, encoder) * job.views / job.batch, _write(job, usable, out)
    cores = len(os.sched_getaffinity(0))
    on_cores = decode + write + (encode * min(cores, torch.get_num_threads()) if job.device == "cpu" else 0)
    stages = (
        Stage("decode", decode, min(max(1, decoders), cores)),
        Stage("encode", encode, encoders),
        Stage("write", write, encoders),
        Stage("cores", on_cores, cores),
    )
    return Measured(stages, len(decoded), len(decoded) - len(usable))


def _decode(job: Job, samples: Sequence[ListedImage], access: Access) -> tuple[list[Decoded], float]:
    recipe = Recipe.of(job)
    keep_blocks()  # as the decoding processes do

    def decode(listed: ListedImage) -> Decoded:
        try:
            raw: bytes | ImageRejectedError = read_listed(listed, access)
        except ImageRejectedError as error:
            raw = error
        return decode_listed(recipe, listed, raw)

    decode(samples[0])  # the first one loads what the others find loaded
    decoded: list[Decoded] = []

    def next_one() -> bool:
        decoded.append(decode(samples[len(decoded)]))
        return len(decoded) < len(samples)

    seconds, _ = _repeated(next_one)
    return decoded, seconds / len(decoded)


def _encode(job: Job, usable: Sequence[Decoded], encoder: Encoder) -> float:
    """Of a batch."""
    batch = np.zeros((job.batch, job.token_size, job.token_size, 3), np.uint8)
    for row in range(job.batch):
        batch[row] = usable[row % len(usable)].views[0].token_image
    began = time.perf_counter()
    encoder(batch)
    first = time.perf_counter() - began
    if first > _LONG and not job.compiled:
        return first
    seconds, batches = _repeated(lambda: bool(encoder(batch).size))
    return seconds / batches


def _write(job: Job, usable: Sequence[Decoded], out: Place) -> float:
    """Of an image in all views, into the output folder, until it is durable."""
    tokens = np.zeros((job.layout.grid, job.layout.grid), np.int16)
    folder = _there(out)
    names = [f"{_PROBE}-{os.getpid()}-{view}" for view in range(job.views)]
    written = 0
    began = time.perf_counter()
    try:
        with ExitStack() as stack:
            writers = [ShardWriter(stack.enter_context(folder.writing(name)), job.layout) for name in names]
            tally = Tally.empty(job.layout)

            def next_one() -> bool:
                nonlocal written
                one = usable[written % len(usable)]
                for view, writer in enumerate(writers):
                    image = one.views[view].image
                    writer.write(sample_key(view, written), image, tokens, SampleNotes(""))
                    tally.add(tokens, image)
                written += 1
                return written < _WRITTEN

            _repeated(next_one)
            for writer in writers:
                writer.close()
        return (time.perf_counter() - began) / written
    finally:
        for name in names:
            if folder.exists(name):
                folder.remove(name)


def _there(out: Place) -> Place:
    """The folder, or the next one around it that is there: on the same disk, most likely."""
    if not out.is_local:
        return out
    path = Path(os.path.abspath(out.path))
    return LocalPlace(next(folder for folder in (path, *path.parents) if folder.exists()))


def _repeated(step: Callable[[], bool]) -> tuple[float, int]:
    """Seconds and number of calls, until there is no more, or it has taken long enough."""
    began, calls = time.perf_counter(), 0
    while True:
        more = step()
        calls += 1
        seconds = time.perf_counter() - began
        if not more or seconds > _SECONDS:
            return seconds, calls
