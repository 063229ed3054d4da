"""Held-out labelled images: each rank's share, in a fixed order, without augmentation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from beit_dist.config.labelled import LabelledLoaderConfig
from beit_dist.images.decoding import Pixels, patchify
from beit_dist.images.labelled.images import LabelledImages
from beit_dist.images.labelled.label_maps import LabelMaps
from beit_dist.images.labelled.views import ClassificationView, SegmentationView
from beit_dist.storage.access import Access

Made = TypeVar("Made")
_AHEAD = 4
"""Images that are decoded ahead, for each thread."""


@dataclass
class HeldOutBatch:
    """Rows of a rank that are measured together."""

    patches: Tensor
    """uint8 (B, patches, patch_bytes); every rank has the same number of batches, all of B rows."""
    labels: Tensor
    """int64 (B,); -1 in rows behind the last sample, which are run too, as at ZeRO 3 all ranks must."""
    samples: Tensor
    """int64 (B,): numbers in the list of images; -1 behind the last."""


@dataclass
class HeldOutImage:
    """A whole image that is measured."""

    pixels: Pixels
    """uint8 (H, W, 3), in its own size."""
    labels: Pixels
    """uint8 (H, W); 255 is no class."""
    sample: int
    """Number in the list of images."""


def measured(count: int, samples: int | None) -> list[int]:
    """Which of ``count`` images are measured: all, or ``samples`` spread evenly, as classes lie together."""
    taken = count if samples is None else min(samples, count)
    return [number * count // taken for number in range(taken)]


def held_out_batches(
    images: LabelledImages,
    view: ClassificationView,
    *,
    rank: int,
    world: int,
    samples: int | None,
    batch: int,
    loader: LabelledLoaderConfig,
    access: Access,
) -> Iterator[HeldOutBatch]:
    """This rank's batches of ``batch`` rows: ranks take turns, sample by sample.

    Args:
        images: what is measured on.
        view: makes a sample of an image.
        rank: this rank.
        world: number of ranks.
        samples: how many are measured, spread evenly over the list; None: all.
        batch: rows of a batch.
        loader: ``workers`` threads decode, at least one.
        access: how URLs are reached.

    Raises:
        DataError: an image cannot be used; it is named.
    """
    model, numbers = view.model, measured(len(images), samples)
    own = numbers[rank::world]

    def make(number: int) -> Pixels:
        return patchify(view.held_out(images, number, access).pixels, model.patch_size)

    made = made_ahead(make, own, loader.workers)
    for first in range(0, -(-len(numbers) // world), batch):
        rows = own[first : first + batch]
        patches = torch.zeros(batch, model.patches, model.patch_bytes, dtype=torch.uint8)
        labels, kept = torch.full((batch,), -1, dtype=torch.int64), torch.full((batch,), -1, dtype=torch.int64)
        for row, number in enumerate(rows):
            patches.numpy()[row] = next(made)
            labels[row], kept[row] = int(images.labels[number]), number
        yield HeldOutBatch(patches, labels, kept)


def held_out_images(
    images: LabelMaps,
    view: SegmentationView,
    *,
    rank: int,
    world: int,
    samples: int | None,
    loader: LabelledLoaderConfig,
    access: Access,
) -> Iterator[HeldOutImage | None]:
    """This rank's whole images, one by one; None where only other ranks have one more. Arguments as above."""
    numbers = measured(len(images), samples)
    own = numbers[rank::world]

    def make(number: int) -> HeldOutImage:
        return HeldOutImage(*view.held_out(images, number, access), number)

    yield from made_ahead(make, own, loader.workers)
    if len(own) < -(-len(numbers) // world):
        yield None


def made_ahead(make: Callable[[int], Made], numbers: Sequence[int], workers: int) -> Generator[Made, None, None]:
    """What ``make`` makes of each number, in threads, in the order of ``numbers``; a few more are under way."""
    workers = max(1, workers)
    with ThreadPoolExecutor(workers, "held-out") as threads:
        waiting: deque[Future[Made]] = deque()
        try:
            for number in numbers:
                waiting.append(threads.submit(make, number))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
