"""From a position to a part of a batch of labelled images. This is what loader workers run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray

from beit_dist.draws import Purpose, permutation
from beit_dist.images.decoding import patchify
from beit_dist.images.labelled.views import Images, View
from beit_dist.storage.access import Access
from beit_dist.stream.parts import DropPath, MemoryLayout, Part, Parts, Shapes, drop_path_depth

_LABELS = {np.dtype(np.int64): torch.int64, np.dtype(np.uint8): torch.uint8}


def row_layout(view: View[Images], rows: int, depth: int) -> MemoryLayout:
    """Where the arrays of ``rows`` samples lie; ``depth``: blocks with drop-path keeps."""
    shapes: Shapes = {
        "patches": (torch.uint8, (rows, view.model.patches, view.model.patch_bytes)),
        "labels": (_LABELS[np.dtype(view.label_dtype)], (rows, *view.label_shape)),
        "samples": (torch.int64, (rows,)),
        "epochs": (torch.int64, (rows,)),
    }
    return MemoryLayout({**shapes, "keeps": (torch.uint8, (rows, depth, 2))} if depth else shapes)


class LabelledPipeline(Parts, Generic[Images]):
    """Parts made of labelled images. The position is the number of samples that were trained on.

    Args:
        images: what is trained on.
        view: makes a sample of an image.
        parts: the rows of the global batch that each worker fills.
        global_batch: samples of a batch over all ranks.
        samples: where to begin.
        seed: keys order, views and drop path.
        drop_path_rates: stochastic-depth rate of each block; all zero leaves out the keeps.
        slots: see :class:`Parts`.
        access: how URLs are reached.
    """

    def __init__(
        self,
        images: Images,
        view: View[Images],
        *,
        parts: Sequence[range],
        global_batch: int,
        samples: int,
        seed: int,
        drop_path_rates: Sequence[float],
        slots: int,
        access: Access,
    ) -> None:
        super().__init__(self._make, self._keep, parts=parts, advance=global_batch, consumed=samples, slots=slots)
        self.images: Images = images
        self.view: View[Images] = view
        self.seed, self.access = seed, access
        self.drop_path = DropPath(seed, drop_path_rates)
        self.depth = drop_path_depth(drop_path_rates)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def layout(self, rows: int) -> MemoryLayout:
        """How a part of so many rows lies in memory."""
        return row_layout(self.view, rows, self.depth)

    def _make(self, part: Part) -> Part:
        """Stage 1: a view of each row's image."""
        arrays, size = self.arrays(part), self.view.model.patch_size
        for row, number in enumerate(part.rows):
            epoch, place = divmod(part.consumed + number, len(self.images))
            sample = int(self._order_of(epoch)[place])
            made = self.view.training(self.images, sample, self.access, self.seed, epoch)
            arrays["patches"][row] = patchify(made.pixels, size)
            arrays["labels"][row] = made.label
            arrays["samples"][row], arrays["epochs"][row] = sample, epoch
        return part

    def _keep(self, part: Part) -> Part:
        """Stage 2: which residual branches of each block are kept for each row."""
        arrays = self.arrays(part)
        if "keeps" in arrays:
            arrays["keeps"][:] = self.drop_path.keeps(arrays["epochs"], arrays["samples"])
        return part

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """The images of an epoch; epochs are asked for in rising order."""
        if self._order is None or self._order[0] != epoch:
            order = permutation(self.seed, Purpose.LABELLED_ORDER, (epoch,), len(self.images))
            self._order = epoch, order
        return self._order[1]
