"""Images to views in processes of their own, so that decoding keeps up with the encoder. The order is kept.

Processes and not threads: blending and colour conversion hold Python's lock. They start by ``spawn``, as a fork
of a process that uses CUDA is not safe, and import neither the tokenizer nor, for version 1 of the pixels, torch.
Each reads the images of its next tasks in threads while it decodes, so that a store's latency is not waited for.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import NamedTuple

from PIL import Image

from beit_dist.errors import SampleError, UserError
from beit_dist.images.decoding import CROP_AREA, Augment, View, decode, make_view, patchify
from beit_dist.images.jpeg_decoders import Decoder
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.storage.access import Access
from beit_dist.storage.retries import counts
from beit_dist.tokenizing.job import Job, PixelVersion
from beit_dist.tokenizing.metrics import Metrics
from beit_dist.tokenizing.sources import ListedImage, read_listed

CHUNK = 8
"""Images of one task: enough to make passing tasks around cheap, few enough to spread over the processes."""
_TASKS = 3
"""Of one process: one is decoded, the others are read ahead. Their files are held in memory."""
_READERS = 2 * CHUNK
BLOCKS = 4
"""Of Pillow's images in memory, 16 MiB each."""

_Read = tuple[bytes | ImageRejectedError, float]
"""An image's bytes, or why they cannot be used; and the seconds it took."""


class Recipe(NamedTuple):
    """How images become views."""

    views: int
    image_size: int
    token_size: int
    patch_size: int
    augment: Augment
    seed: int
    pixel_version: PixelVersion = 1
    decoder: Decoder = "pillow"
    crop_area: float = CROP_AREA[0]

    @classmethod
    def of(cls, job: Job) -> Recipe:
        """The recipe of a job."""
        sizes = (job.views, job.image_size, job.token_size, job.patch_size)
        decoder: Decoder = "pillow" if job.decoder == "pillow" else "simplejpeg"
        return cls(*sizes, job.augment, job.seed, job.pixel_version, decoder, job.crop_area)

    def views_of(self, raw: bytes, sample_id: int) -> list[View]:
        """All views of an image, decoded once.

        Raises:
            ImageRejectedError, MemoryError: as :func:`beit_dist.images.decoding.decode`.
        """
        wanted = {"image_size": self.image_size, "token_size": self.token_size, "seed": self.seed}
        if self.pixel_version == 2:
            from beit_dist.images.fast_views import make_fast_views  # PyTorch, which version 1 does without

            return make_fast_views(
                raw,
                views=self.views,
                augment=self.augment,
                sample_id=sample_id,
                decoder=self.decoder,
                crop_area=self.crop_area,
                **wanted,
            )
        image = decode(raw, self.decoder)
        return [
            make_view(
                image,
                augment=self.augment,
                sample_id=sample_id,
                view=view,
                crop_area=self.crop_area,
                **wanted,
            )
            for view in range(self.views)
        ]


class Decoded(NamedTuple):
    """An image in all its views; or none and the reason."""

    listed: ListedImage
    views: tuple[View, ...]
    """Their ``image`` is already patches: uint8 (patches, 3 · patch_size²)."""
    reason: str = ""
    kind: str = ""
    """The reason's class."""


class _Done(NamedTuple):
    """What a process sends back for a task."""

    decoded: list[Decoded]
    read_seconds: float
    decode_seconds: float
    retries: dict[str, int]
    error: Exception | None = None


def decode_listed(recipe: Recipe, listed: ListedImage, raw: bytes | ImageRejectedError) -> Decoded:
    """Decode one image, once, and make all its views; one that cannot be used is not an error.

    Args:
        raw: its bytes, or why there are none that can be used.

    Raises:
        SampleError: this machine has too little memory for it.
    """
    try:
        if isinstance(raw, ImageRejectedError):
            raise raw
        views = tuple(
            made._replace(image=patchify(made.image, recipe.patch_size))
            for made in recipe.views_of(raw, listed.sample_id)
        )
    except ImageRejectedError as error:
        return Decoded(listed, (), str(error), error.kind)
    except MemoryError:
        raise SampleError(
            f"{listed.place}: {listed.name}: not enough memory to decode it. Use fewer --decoders, or more memory"
        ) from None
    return Decoded(listed, views)


class Decoders:
    """A pool of decoding processes, for one sequence of images.

    Args:
        processes: with 0 of them the images are decoded by the caller.
        access: how images at URLs are reached.
        metrics: told what the processes spend their time on.
    """

    def __init__(
        self, recipe: Recipe, processes: int, access: Access | None = None, metrics: Metrics | None = None
    ) -> None:
        self._recipe, self._access, self._metrics = recipe, access or Access(), metrics
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, recipe, self._access), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies closes the pipe's only other end
            self._processes.append(process)
            self._connections.append(ours)

    def decode(self, images: Iterable[ListedImage]) -> Iterator[Decoded]:
        """The images in the order of ``images``."""
        if not self._connections:
            yield from map(self._decode_here, images)
            return
        rest = iter(images)
        chunks = iter(lambda: list(itertools.islice(rest, CHUNK)), [])
        turns = itertools.cycle(self._connections)
        pending: deque[Connection] = deque()
        try:
            for chunk in itertools.islice(chunks, _TASKS * len(self._connections)):
                pending.append(next(turns))
                pending[-1].send(chunk)
            while pending:
                connection = pending.popleft()
                done: _Done = connection.recv()
                if done.error is not None:
                    raise done.error
                for chunk in itertools.islice(chunks, 1):
                    connection.send(chunk)
                    pending.append(connection)
                self._note(done)
                yield from done.decoded
        except (EOFError, ConnectionError):
            raise SampleError(
                "a decoding process died, most likely because memory ran out. Run the same command again with "
                "fewer --decoders or more memory: finished shards are kept"
            ) from None

    def close(self) -> None:
        """Stop the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()

    def _decode_here(self, listed: ListedImage) -> Decoded:
        raw, read_seconds = _timed_read(listed, self._access)
        began = time.perf_counter()
        decoded = decode_listed(self._recipe, listed, raw)
        self._note(_Done([], read_seconds, time.perf_counter() - began, {}))
        return decoded

    def _note(self, done: _Done) -> None:
        if self._metrics is not None:
            self._metrics.spent("read", done.read_seconds)
            self._metrics.spent("decode", done.decode_seconds)
            self._metrics.retried(done.retries)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def keep_blocks(blocks: int = BLOCKS) -> None:
    """Have Pillow keep the memory of its images for the next ones, in this process from now on.

    It keeps none by default. Memory that is given back and taken again costs page faults: a seventh of the time
    for an image of 500×375 px, more for larger ones.
    """
    Image.core.set_blocks_max(blocks)  # type: ignore[attr-defined]


def _serve(connection: Connection, recipe: Recipe, access: Access) -> None:
    """A decoding process: tasks in, their images out, until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the pool
    warnings.filterwarnings("ignore", module="PIL")  # of images that are used all the same; ours are reasons
    keep_blocks()
    if recipe.pixel_version == 2:
        import torch

        torch.set_num_threads(1)
    tasks: deque[list[tuple[ListedImage, Future[_Read]]]] = deque()
    with ThreadPoolExecutor(_READERS) as readers:
        try:
            while True:
                while not tasks or connection.poll():
                    chunk: list[ListedImage] = connection.recv()
                    tasks.append([(listed, readers.submit(_timed_read, listed, access)) for listed in chunk])
                connection.send(_run(recipe, tasks.popleft()))
        except (EOFError, ConnectionError):
            os._exit(0)  # at once: a read of a store may be waiting for a long time


def _run(recipe: Recipe, task: list[tuple[ListedImage, Future[_Read]]]) -> _Done:
    decoded, read_seconds, decode_seconds = [], 0.0, 0.0
    try:
        for listed, reading in task:
            raw, seconds = reading.result()
            began = time.perf_counter()
            decoded.append(decode_listed(recipe, listed, raw))
            read_seconds += seconds
            decode_seconds += time.perf_counter() - began
    except UserError as error:
        return _Done([], 0.0, 0.0, {}, error)
    except Exception:
        return _Done([], 0.0, 0.0, {}, RuntimeError(f"in a decoding process:\n{traceback.format_exc()}"))
    return _Done(decoded, read_seconds, decode_seconds, counts.take())


def _timed_read(listed: ListedImage, access: Access) -> _Read:
    began = time.perf_counter()
    raw: bytes | ImageRejectedError
    try:
        raw = read_listed(listed, access)
    except ImageRejectedError as error:
        raw = error
    return raw, time.perf_counter() - began
