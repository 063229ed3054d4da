"""The offline job: each stage alone, and all of it from JPEGs to committed shards against a plain loop."""

from __future__ import annotations

import io
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from beit_dist.benches.measuring import Row, row, seconds
from beit_dist.benches.photos import write_photos
from beit_dist.benches.tokenize_stages import encoder_rows, view_rows
from beit_dist.config.dvae import DVAEConfig
from beit_dist.images.decoding import make_view, patchify
from beit_dist.models.dvae import DVAE
from beit_dist.storage.local import LocalPlace
from beit_dist.tokenizing.decoding import Decoders, Recipe
from beit_dist.tokenizing.encoder import DVAEEncoder, Encoder
from beit_dist.tokenizing.freeze import freeze
from beit_dist.tokenizing.job import Job, record_job, software
from beit_dist.tokenizing.parts import Part
from beit_dist.tokenizing.sources import SourceList
from beit_dist.tokenizing.worker import Worker

BATCH, SHARD = 64, 128
RECIPE = Recipe(1, 224, 112, 16, "random", 0)


def measure(quick: bool) -> list[Row]:
    """One view of ImageNet-sized JPEGs, from the first batch on: starting the processes is not part of it.

    Two encoders: a real dVAE, and one that only waits, as a device does that leaves the cores to the others.
    """
    images, repetitions = (320, 2) if quick else (640, 5)
    cores = len(os.sched_getaffinity(0))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        stages = view_rows(Path(folder), quick) + encoder_rows(quick)
        write_photos(Path(folder, "photos"), images)
        freeze([str(Path(folder, "photos"))], LocalPlace(Path(folder)), 0)
        sources = SourceList(LocalPlace(Path(folder)), 10**6)
        files = [source.place for source in sources.read(0)]
        for case, encoder in _encoders().items():
            waits: list[float] = []
            contenders: dict[str, Callable[[], float]] = {
                "ours, whole job": partial(_job, Path(folder), sources, encoder, cores, waits),
                "plain loop, no shards": partial(_plain_loop, files, encoder),
            }
            if not rows:
                contenders["ours, views only"] = partial(_views_only, sources, cores)
                contenders["Pillow, decode only"] = partial(_decode_only, files)
            rates: dict[str, list[float]] = {who: [] for who in contenders}
            by_core: dict[str, list[float]] = {who: [] for who in contenders}
            for _ in range(repetitions):
                start = seconds(partial(_start_only, sources, cores), _core_seconds)
                for who, work in contenders.items():
                    before = _core_seconds()
                    rates[who].append(work())
                    used = _core_seconds() - before - (start if who.startswith("ours") else 0)
                    by_core[who].append(images / used)
            for who in contenders:
                rows.append(row("tokenize", case, who, rates[who], "images/s"))
                rows.append(row("tokenize", case, who, by_core[who], "images/core-s"))
            rows.append(row("tokenize", case, "ours, encoder waits", waits, "of the time"))
    return stages + rows


def _core_seconds() -> float:
    """What this process and those it has waited for have used of the cores; a busy machine hardly changes it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class _Clock:
    """Images a second from the first call on; what came before it is not counted."""

    def __init__(self) -> None:
        self._began, self._skipped = 0.0, 0

    def begin(self, images: int) -> None:
        """So many images are behind us; only the first call counts."""
        if not self._began:
            self._began, self._skipped = time.perf_counter(), images

    def rate(self, images: int) -> float:
        """The rate, now that there are so many."""
        return (images - self._skipped) / (time.perf_counter() - self._began)


def _encoders() -> dict[str, Encoder]:
    if torch.cuda.is_available():
        device, config, precision = "cuda", DVAEConfig(), "bf16"
    else:
        device, precision = "cpu", "fp32"
        config = DVAEConfig(vocabulary=512, hidden=16, blocks_per_group=1, decoder_input=16)
    model = DVAE(config).requires_grad_(False).eval().to(device)
    real = DVAEEncoder(model, precision)  # type: ignore[arg-type]
    return {f"dVAE, width {config.hidden}, {device}, {precision}": real, "encoder waits 3 ms an image": _wait}


def _wait(images: NDArray[np.uint8]) -> NDArray[np.int16]:
    time.sleep(0.003 * len(images))
    return np.zeros((len(images), 14, 14), np.int16)


def _job(folder: Path, listed: SourceList, encoder: Encoder, cores: int, waits: list[float]) -> float:
    """All of it: read, decode, augment, encode, write, hash, fsync, commit.

    Args:
        waits: gets the share of the time, from the first batch's end to the last one's, in which the encoder had
            nothing to do.
    """
    clock = _Clock()
    calls: list[tuple[float, float]] = []

    def timed(images: NDArray[np.uint8]) -> NDArray[np.int16]:
        began = time.perf_counter()
        tokens = encoder(images)
        calls.append((began, time.perf_counter()))
        clock.begin(BATCH)
        return tokens

    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = LocalPlace(Path(name))
        Path(name, "sources.jsonl").write_bytes(Path(listed.path).read_bytes())
        sources = SourceList(out, SHARD)
        settings: tuple[Any, ...] = ("0" * 64, 8192, 224, 16, 1, SHARD, 0, "random", BATCH, "fp32", "cpu")
        job = Job(sources.sha256, *settings, *software().values())
        record_job(out, job)
        Worker(Part("", out, job, sources), timed, index=0, count=1, decoders=cores, max_rejected=0).run()
        busy = sum(ended - began for began, ended in calls[1:])
        waits.append(1 - busy / (calls[-1][1] - calls[0][1]))
        return clock.rate(sources.header.entries)


def _views_only(sources: SourceList, cores: int) -> float:
    clock = _Clock()
    with Decoders(RECIPE, cores) as decoders:
        for number, _ in enumerate(decoders.decode(sources.read(0))):
            if number == BATCH:
                clock.begin(BATCH)
        return clock.rate(sources.header.entries)


def _start_only(sources: SourceList, cores: int) -> None:
    """What the processes cost before the first image: each gets one task, and it is a short one."""
    with Decoders(RECIPE, cores) as decoders:
        for _ in decoders.decode(sources.read(0)[:1]):
            pass


def _plain_loop(files: list[str], encoder: Encoder) -> float:
    """What one would write first: one process, an image after the other, batches to the encoder; no shards."""
    clock, batch = _Clock(), []
    for number, file in enumerate(files):
        view = make_view(
            _pillow(file), image_size=224, token_size=112, augment="random", seed=0, sample_id=number, view=0
        )
        patchify(view.image, 16)
        batch.append(view.token_image)
        if len(batch) == BATCH:
            encoder(np.stack(batch))
            batch.clear()
            clock.begin(BATCH)
    return clock.rate(len(files))


def _decode_only(files: list[str]) -> float:
    clock = _Clock()
    clock.begin(0)
    for file in files:
        _pillow(file)
    return clock.rate(len(files))


def _pillow(file: str) -> Image.Image:
    with Image.open(io.BytesIO(Path(file).read_bytes())) as image:
        image.load()
        rgb: Image.Image = image.copy()
        return rgb
