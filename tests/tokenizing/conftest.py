"""A small folder of images, a stand-in for the tokenizer, and a job run in this process."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from beit_dist.storage.opening import open_place
from beit_dist.tokenizing.finish import finish
from beit_dist.tokenizing.freeze import freeze
from beit_dist.tokenizing.job import Job, record_job
from beit_dist.tokenizing.parts import parts_of
from beit_dist.tokenizing.sources import SourceList
from beit_dist.tokenizing.worker import Worker, WorkerReport

VOCABULARY = 64


def block_means(images: NDArray[np.uint8]) -> NDArray[np.int16]:
    """A tokenizer of sorts: a token is the mean of its 8×8 pixels, in 64 steps."""
    count, side = images.shape[0], images.shape[1] // 8
    blocks = images.reshape(count, side, 8, side, 8, 3).astype(np.int64).mean(axis=(2, 4, 5))
    return (blocks // 4).astype(np.int16)


class Bench:
    """Runs steps of a job on one folder of images."""

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, root / "images"
        self.source = str(self.images)
        self.encoder: Callable[[NDArray[np.uint8]], NDArray[np.int16]] = block_means
        self.seen_shapes: set[tuple[int, ...]] = set()

    def job(self, out: Path | str, **changes: Any) -> tuple[Job, SourceList]:
        """The recorded job of ``out``; its list is frozen if it is not yet."""
        source = changes.pop("source", self.source)
        seed = changes.get("seed", 0)
        place = open_place(out)
        held_out = changes.pop("held_out", None)
        freeze([source] if isinstance(source, str) else source, place, seed, held_out=held_out)
        job = Job("", "a" * 64, VOCABULARY, 32, 8, 2, 4, seed, "random", 3, "fp32", "cpu", "2.0", "11.0", "1.26")
        job = replace(job, **changes)
        sources = SourceList(place, job.shard_samples)
        job = replace(job, images=sources.sha256)
        record_job(place, job)
        return job, sources

    def work(
        self,
        out: Path | str,
        index: int = 0,
        count: int = 1,
        decoders: int = 0,
        max_rejected: int = 99,
        **changes: Any,
    ) -> WorkerReport:
        """Be one worker."""
        job, sources = self.job(out, **changes)

        def encode(images: NDArray[np.uint8]) -> NDArray[np.int16]:
            self.seen_shapes.add(images.shape)
            return self.encoder(images)

        report = WorkerReport(0, 0, 0, ())
        for part in parts_of(open_place(out), job, sources):
            record_job(part.out, part.job)
            worker = Worker(
                part,
                encode,
                index=index,
                count=count,
                decoders=decoders,
                max_rejected=max_rejected,
                rejected=report.rejected,
            )
            report = report.plus(worker.run())
        return report

    def finish(
        self,
        out: Path | str,
        settings: Mapping[str, Any] | None = None,
        max_rejected: str = "100%",
        workers: int | None = None,
    ) -> Any:
        return finish(open_place(out), settings or {}, max_rejected, workers)

    def run(self, name: str, **changes: Any) -> Path:
        """A whole data set by one worker."""
        out = self.root / name
        self.work(out, **changes)
        self.finish(out)
        return out


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """13 images in three class folders: shards of 4, 4, 4 and 1."""
    write_images(tmp_path / "images", 13)
    return Bench(tmp_path)


def write_images(folder: Path, count: int) -> None:
    for number in range(count):
        path = folder / f"class-{number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((28 + number, 24), Image.Resampling.BICUBIC).save(path)


def pack(folder: Path, tar: Path) -> None:
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, arcname=".")


def content(out: Path) -> dict[str, str]:
    """sha256 of every file of a data set that training sees, and of the rejects."""
    paths = [*out.glob("v*/*"), out / "manifest.json", out / "rejected.jsonl"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def read_content() -> Callable[[Path], dict[str, str]]:
    return content


@pytest.fixture
def pack_tar() -> Callable[[Path, Path], None]:
    return pack


@pytest.fixture
def settings_of() -> Callable[[Job], dict[str, Any]]:
    return asdict
