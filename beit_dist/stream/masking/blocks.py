"""Blocks of random size and shape, placed on a grid: what the modes of the paper and of its code share.

A mask is one Python integer of ``height · width`` bits while it is made: a rectangle is a shifted constant and
its gain is one ``bit_count``, which is many times faster than arrays of this size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.draws import Purpose, below, words
from beit_dist.errors import ConfigError
from beit_dist.stream.masking.base import Masks

MIN_ASPECT = 0.3
"""Least ratio of a block's sides; the greatest is its inverse (unilm's default and the paper's Algorithm 1)."""
UNIT = 2.0**-53
"""Makes a float in [0, 1) of the upper 53 bits of a word, as :func:`beit_dist.draws.uniforms` does."""

_WORDS_PER_TRY = 4  # area, aspect, top, left
_FIRST_WORDS = 64


class BlockMasks(Masks):
    """Rectangles on a grid. A subclass says which, and calls :meth:`check_blocks` when it knows its numbers."""

    spans_grid: ClassVar[bool]
    """Whether a block may be as high or as wide as the grid."""

    def __init__(self, masking: MaskingConfig, grid: int | tuple[int, int], seed: int) -> None:
        super().__init__(masking, grid, seed)
        self.min_block = masking.min_block
        self.most_height = self.height if self.spans_grid else self.height - 1
        self.most_width = self.width if self.spans_grid else self.width - 1
        self._bytes = -(-self.patches // 8)
        self._rectangles = [
            [_rectangle(height, width, self.width) for width in range(self.most_width + 1)]
            for height in range(self.most_height + 1)
        ]

    @abstractmethod
    def mask(self, epoch: int, sample_id: int) -> int:
        """The mask of a sample in an epoch: bit p is set where patch p is masked. Never 0."""

    def masked(self, epoch: int, sample_id: int) -> NDArray[np.integer]:
        """The bits of :meth:`mask`."""
        bits = np.frombuffer(self.mask(epoch, sample_id).to_bytes(self._bytes, "little"), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little"))

    def place(self, height: int, width: int, top_word: int, left_word: int) -> int:
        """A rectangle at a uniform place inside the grid, both ends included."""
        top = below(top_word, self.height - height + 1)
        left = below(left_word, self.width - width + 1)
        return self._rectangles[height][width] << (top * self.width + left)

    def tries(self, epoch: int, sample_id: int) -> Iterator[tuple[int, ...]]:
        """Four words at a time; longer draws of a key begin with the same words."""
        start, count = 0, _FIRST_WORDS
        while True:
            drawn = words(self.seed, Purpose.MASK, (epoch, sample_id), count).tolist()[start:]
            yield from zip(*[iter(drawn)] * _WORDS_PER_TRY, strict=True)
            start, count = count, 4 * count

    def check_blocks(self, most: int, target: float, largest: int) -> None:
        """Refuse a ``min_block`` with which the search for a first block would not end.

        Args:
            most: patches that can be masked, for the message.
            target: up to which target areas are drawn, in patches.
            largest: patches of the largest block that is accepted.

        Raises:
            ConfigError: no block can be placed.
        """
        if self.min_block > most:
            raise ConfigError("masking.min_block", self.min_block, f"at most the {most} masked patches")
        # A block that can be drawn from an empty mask: found on a lattice of areas and aspects, so that each
        # try finds one with a probability of at least about one in a thousand.
        steps = [(step + 0.5) / 32 for step in range(32)]
        for area in (self.min_block + (target - self.min_block) * step for step in steps):
            for aspect in (math.exp(math.log(1 / MIN_ASPECT) * (2 * step - 1)) for step in steps):
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                fits = 0 < height <= self.most_height and 0 < width <= self.most_width
                if fits and height * width <= largest:
                    return
        raise ConfigError(
            "masking.min_block",
            self.min_block,
            f"blocks that fit into the {self.height}×{self.width} grid and the {most} masked patches",
            "Lower masking.min_block.",
        )


def _rectangle(height: int, width: int, grid_width: int) -> int:
    """The bits of a rectangle in the top left corner of a grid."""
    row = (1 << width) - 1
    return sum(row << (y * grid_width) for y in range(height))
