"""Images to views in processes of their own, so that decoding keeps up with the encoder. The order is kept.

Processes and not threads: blending and colour conversion hold Python's lock. They start by ``spawn``, as a fork
of a process that uses CUDA is not safe, and import neither torch nor the tokenizer.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import NamedTuple

from beit_dist.data.images import Augment, ImageRejectedError, View, decode, make_view, patchify
from beit_dist.errors import SampleError
from beit_dist.tokenizing.sources import Source, read_source

CHUNK = 8
"""Images of one task: enough to make passing tasks around cheap, few enough to spread over the processes."""


class Recipe(NamedTuple):
    """How images become views."""

    views: int
    image_size: int
    token_size: int
    patch_size: int
    augment: Augment
    seed: int


class Decoded(NamedTuple):
    """An image in all its views; or none and the reason."""

    source: Source
    views: tuple[View, ...]
    """Their ``image`` is already patches: uint8 (patches, 3 · patch_size²)."""
    reason: str = ""


def decode_source(recipe: Recipe, source: Source) -> Decoded:
    """Read and decode one image, once, and make all its views.

    Raises:
        DataError, SampleError: the file cannot be read; an image that can be read but not used is not an error.
    """
    raw = read_source(source)
    try:
        image = decode(raw)
    except ImageRejectedError as error:
        return Decoded(source, (), str(error))
    views = []
    for view in range(recipe.views):
        made = make_view(
            image,
            image_size=recipe.image_size,
            token_size=recipe.token_size,
            augment=recipe.augment,
            seed=recipe.seed,
            sample_id=source.sample_id,
            view=view,
        )
        views.append(made._replace(image=patchify(made.image, recipe.patch_size)))
    return Decoded(source, tuple(views))


class Decoders:
    """A pool of decoding processes; with 0 processes the images are decoded by the caller.

    Args:
        ahead: images decoded ahead of the consumer.
    """

    def __init__(self, recipe: Recipe, processes: int, ahead: int) -> None:
        self._recipe = recipe
        self._tasks_ahead = 2 * processes + -(-ahead // CHUNK)
        self._pool: ProcessPoolExecutor | None = None
        if processes:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, initializer=_start_decoder)

    def decode(self, sources: Sequence[Source]) -> Iterator[Decoded]:
        """The images in the order of ``sources``."""
        if self._pool is None:
            yield from (decode_source(self._recipe, source) for source in sources)
            return
        chunks = (sources[start : start + CHUNK] for start in range(0, len(sources), CHUNK))
        pending: deque[Future[list[Decoded]]] = deque()
        try:
            for chunk in chunks:
                pending.append(self._pool.submit(_decode_chunk, self._recipe, list(chunk)))
                if len(pending) >= self._tasks_ahead:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool:
            raise SampleError(
                "a decoding process died, most likely killed for want of memory. Run the same command again, with "
                "fewer --decoders or more memory: finished shards are kept"
            ) from None
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Stop the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decode_chunk(recipe: Recipe, sources: list[Source]) -> list[Decoded]:
    return list(map(functools.partial(decode_source, recipe), sources))


def _start_decoder() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the pool
    warnings.filterwarnings("ignore", module="PIL")  # of images that are used all the same; ours are reasons
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its pool, which would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
