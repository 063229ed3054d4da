"""Random square crops of any collection of images, decoded once where memory allows: the tokenizer's diet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from beit_dist.draws import Purpose, below, permutation, uniforms, words
from beit_dist.errors import DataError
from beit_dist.images.decoding import decode
from beit_dist.images.files import ImageFile, images_digest, sizes_digest
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.storage.access import Access

Pixels = NDArray[np.uint8]

_AT_ONCE = 256
"""Images read between two looks at memory and stop requests."""
_LOOK = 0.5
"""Seconds without a batch between two looks for stop requests."""
_AHEAD = 3
"""Batches under way while one is used, at least."""


class ImagePool:
    """Images by number, shrunk to what crops need, kept as uint8 within a memory budget.

    Reading begins with the constructor: images that cannot be decoded are counted and left out, those past
    the budget are decoded whenever they are used.

    Args:
        shorter: images are shrunk until their shorter side has this many pixels; none is enlarged.
        budget: bytes of decoded images to keep.
        workers: threads that read and decode.
        least: images without which there is nothing to do.
        access: how URLs are reached.
        stop: looked at while images are read; once true, no more are, and the pool is unusable.
        way_out: what else helps where there are too few, for the message.

    Raises:
        DataError: an image cannot be read, or fewer than ``least`` can be decoded.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        shorter: int,
        budget: int,
        workers: int,
        least: int,
        access: Access | None = None,
        stop: Callable[[], bool] = lambda: False,
        way_out: str = "",
    ) -> None:
        self._shorter, self._access = shorter, access or Access()
        self._files: list[ImageFile] = []
        self._kept: list[Pixels] = []
        self.rejected: list[str] = []
        used, number = 0, 0
        with (
            ThreadPoolExecutor(workers) as threads,
            tqdm(total=len(files), desc="reading images", unit=" images", disable=None) as bar,
        ):
            while number < len(files) and used < budget:
                if stop():
                    return
                some = files[number : number + _AT_ONCE]
                for file, pixels in zip(some, threads.map(self._try, some), strict=True):
                    if isinstance(pixels, str):
                        self.rejected.append(f"{file}: {pixels}")
                        continue
                    self._files.append(file)
                    self._kept.append(pixels)
                    used += pixels.nbytes
                number += len(some)
                bar.update(len(some))
        self._files += files[number:]
        if len(self._files) < least:
            broken = self.rejected
            why = f" ({len(broken)} cannot be decoded; the first is {broken[0]})" if broken else ""
            raise DataError(
                f"got {len(self._files)} usable images, expected at least {least}{why}. Give more images{way_out}."
            )

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, number: int) -> str:
        """The name of an image's file."""
        return str(self._files[number])

    @cached_property
    def digest(self) -> str:
        """The digest of the usable images, in order; see :func:`beit_dist.images.files.images_digest`.

        Raises:
            DataError: an image cannot be read.
        """
        return images_digest(self._files, self._access)

    def has_digest(self, digest: str) -> bool:
        """Whether ``digest``, which may come from an old run, belongs to these images."""
        return digest in (self.digest, sizes_digest(self._files))

    def __getitem__(self, number: int) -> Pixels:
        """uint8 ``(height, width, 3)``."""
        if number < len(self._kept):
            return self._kept[number]
        pixels = self._try(self._files[number])
        if isinstance(pixels, str):
            # Past the budget, and never looked at before: another image takes its place, always the same one.
            if not self._kept:
                raise DataError(f"{self._files[number]}: {pixels}. Remove it, or raise cache_gib.")
            return self._kept[number % len(self._kept)]
        return pixels

    def _try(self, file: ImageFile) -> Pixels | str:
        try:
            image = decode(file.read(self._access))
        except ImageRejectedError as error:
            return str(error)
        factor = self._shorter / min(image.size)
        if factor < 1:
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.BOX)
        return np.asarray(image)


class Crops(NamedTuple):
    """One rank's rows of a batch."""

    pixels: Pixels
    """uint8 ``(rows, 3, side, side)``."""
    images: list[int]
    """The number of each row's image."""
    wait_seconds: float
    """How long the caller waited."""


class CropBatches:
    """One rank's rows of batches without end: random crops.

    Every image comes once per epoch, in an order of its own. Image, box and flip are keyed by (seed, position),
    where row r of batch b has position ``b · batch + r``: neither ranks, threads nor restarts change a batch.

    Args:
        numbers: the images of ``pool`` to use.
        batch: rows of a whole batch.
        share: ``side`` as a share of the view that a drawn square becomes (1 crops whole views).
        rows: which rows of each batch to make; by default all.
        first: number of the first batch.
    """

    def __init__(
        self,
        pool: ImagePool,
        numbers: Sequence[int],
        *,
        batch: int,
        side: int,
        scale: tuple[float, float],
        share: float,
        seed: int,
        workers: int,
        rows: range | None = None,
        first: int = 0,
    ) -> None:
        self._pool, self._numbers, self._seed = pool, numbers, seed
        self._side, self._scale, self._share = side, scale, share
        self._batch, self._rows = batch, rows or range(batch)
        self._threads = ThreadPoolExecutor(workers)
        self._ahead = max(_AHEAD, workers + 1)
        self._ready: list[tuple[Future[Pixels], list[int]]] = []
        self._number = first
        self._epoch = -1
        self._order: NDArray[np.int64] | None = None

    def next_unless(self, interrupted: Callable[[], bool]) -> Crops | None:
        """The next batch; None if ``interrupted()``, which is asked only while there is none."""
        while len(self._ready) < self._ahead:
            position = self._number * self._batch + self._rows.start
            picks = [self._pick(position + row) for row in range(len(self._rows))]
            self._ready.append((self._threads.submit(self._make, picks, position), picks))
            self._number += 1
        began = time.perf_counter()
        made, picks = self._ready[0]
        while not wait([made], timeout=_LOOK).done:
            if interrupted():
                return None
        self._ready.pop(0)
        return Crops(made.result(), picks, time.perf_counter() - began)

    def close(self) -> None:
        """Stop the threads; crops under way are finished, those waiting are not."""
        self._threads.shutdown(cancel_futures=True)

    def _pick(self, position: int) -> int:
        """The image at a position; positions are asked for in rising order."""
        epoch, row = divmod(position, len(self._numbers))
        if self._order is None or epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(self._seed, Purpose.TOKENIZER_ORDER, (epoch,), len(self._numbers))
        return self._numbers[int(self._order[row])]

    def _make(self, picks: list[int], position: int) -> Pixels:
        batch = np.empty((len(picks), self._side, self._side, 3), np.uint8)
        for row, number in enumerate(picks):
            batch[row] = self._crop(self._pool[number], position + row)
        return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))

    def _crop(self, pixels: Pixels, position: int) -> Pixels:
        raw = words(self._seed, Purpose.TOKENIZER_ORDER, (position, 1), 4)
        zoom, flip = uniforms(raw[:2])
        height, width, _ = pixels.shape
        low, high = (math.log(bound) for bound in self._scale)
        shorter = min(height, width)
        side = max(1, min(shorter, round(shorter * math.exp(low + (high - low) * float(zoom)) * self._share)))
        left, top = below(int(raw[2]), width - side + 1), below(int(raw[3]), height - side + 1)
        square = Image.fromarray(pixels[top : top + side, left : left + side])
        crop = np.asarray(square.resize((self._side, self._side), Image.Resampling.BICUBIC))
        return crop[:, ::-1] if flip < 0.5 else crop


def centred_view(pixels: Pixels, side: int) -> Pixels:
    """The largest centred square of an image, resized: uint8 ``(side, side, 3)``."""
    height, width, _ = pixels.shape
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    image = Image.fromarray(pixels[top : top + square, left : left + square])
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
