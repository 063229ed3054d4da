"""Which patches of an image are masked: blocks of random size and shape, keyed by (seed, epoch, sample id).

Three modes:

- ``original``: the released code's generator (unilm ``masking_generator.py``). Up to ``masked_patches``; about a
  third of the masks have fewer.
- ``exact`` (the default): the same blocks, then single patches up to exactly ``masked_patches``.
- ``paper``: Algorithm 1 of arXiv 2106.08254, which masks more than ``ratio`` of the patches, often by several.

A mask is one Python integer of ``height · width`` bits while it is made: a rectangle is a shifted constant and
its gain is one ``bit_count``, which is many times faster than arrays of this size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from beit_dist.config import MaskingConfig
from beit_dist.data.draws import Purpose, below, words
from beit_dist.errors import ConfigError

Int16s = NDArray[np.int16]

MIN_ASPECT = 0.3
"""Least ratio of a block's sides; the greatest is its inverse (unilm's default and the paper's Algorithm 1)."""
TRIES_PER_BLOCK = 10
"""Draws after which ``original`` and ``exact`` give up looking for one more block (unilm)."""

_WORDS_PER_TRY = 4  # area, aspect, top, left
_FIRST_WORDS = 64
_UNIT = 2.0**-53


class MaskGenerator:
    """Masks for one grid and seed.

    Args:
        grid: side of a square grid in patches, or (height, width).
        masking: the algorithm and its numbers.
        seed: of the run.

    Raises:
        ConfigError: no block can be placed, or nothing would be left unmasked.

    Attributes:
        positions_per_image: K, the length of every row of positions. In mode ``exact`` all K are masked; otherwise
            K is the most that can be, and rows are padded.
    """

    def __init__(self, grid: int | tuple[int, int], masking: MaskingConfig, seed: int) -> None:
        self.height, self.width = (grid, grid) if isinstance(grid, int) else grid
        self.patches = self.height * self.width
        self.mode, self.min_block, self.seed = masking.mode, masking.min_block, seed
        self.budget = masking.budget(self.patches)
        self.threshold = masking.ratio * self.patches
        self._bytes = -(-self.patches // 8)
        self._log_aspect = math.log(1 / MIN_ASPECT)
        paper = self.mode == "paper"
        # The released code wants rectangles strictly inside the grid; Algorithm 1 only wants them to fit.
        self._most_height = self.height if paper else self.height - 1
        self._most_width = self.width if paper else self.width - 1
        self._rectangles = [
            [_rectangle(height, width, self.width) for width in range(self._most_width + 1)]
            for height in range(self._most_height + 1)
        ]
        self._check()
        self.positions_per_image = self._paper_bound() if paper else self.budget

    def positions(self, epoch: int, sample_id: int) -> Int16s:
        """The masked patches of a sample in an epoch.

        Returns:
            (K,) row-major patch indices, ascending, padded at the end with -1. Never empty.
        """
        draws = self._draws(epoch, sample_id)
        mask = self._paper_blocks(draws) if self.mode == "paper" else self._original_blocks(draws)
        if self.mode == "exact":
            mask = self._top_up(mask, epoch, sample_id)
        bits = np.frombuffer(mask.to_bytes(self._bytes, "little"), np.uint8)
        masked = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        positions = np.full(self.positions_per_image, -1, np.int16)
        positions[: len(masked)] = masked
        return positions

    # --------------------------------------------------------------------------------------- the algorithms

    def _original_blocks(self, draws: Iterator[tuple[int, ...]]) -> int:
        """The released code's loop: blocks are added while they fit into what is left of the budget."""
        sqrt, exp, smallest = math.sqrt, math.exp, self.min_block
        lowest, spread = -self._log_aspect, 2 * self._log_aspect * _UNIT
        mask, left, tries = 0, self.budget, TRIES_PER_BLOCK
        for area_word, aspect_word, top_word, left_word in draws:
            # As random.uniform does: when less is left than min_block, the bounds are simply reversed.
            area = smallest + (left - smallest) * ((area_word >> 11) * _UNIT)
            aspect = exp(lowest + spread * (aspect_word >> 11))
            height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if height <= self._most_height and width <= self._most_width:
                block = self._place(height, width, top_word, left_word)
                gain = (block & ~mask).bit_count()
                if 0 < gain <= left:
                    mask |= block
                    left -= gain
                    if not left:
                        break
                    tries = TRIES_PER_BLOCK
                    continue
            tries -= 1
            if not tries:
                if mask:  # the released code gives up here even with nothing masked
                    break
                tries = TRIES_PER_BLOCK
        return mask

    def _paper_blocks(self, draws: Iterator[tuple[int, ...]]) -> int:
        """Algorithm 1: blocks until more than ``ratio`` of the patches is masked."""
        mask = count = 0
        while count <= self.threshold:
            area_word, aspect_word, top_word, left_word = next(draws)
            area = self.min_block + (self.threshold - count - self.min_block) * _uniform(area_word)
            aspect = MIN_ASPECT + (1 / MIN_ASPECT - MIN_ASPECT) * _uniform(aspect_word)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height <= self._most_height and width <= self._most_width:
                mask |= self._place(height, width, top_word, left_word)
                count = mask.bit_count()
        return mask

    def _top_up(self, mask: int, epoch: int, sample_id: int) -> int:
        """Add the unmasked patches with the smallest words until the budget is reached."""
        missing = self.budget - mask.bit_count()
        if missing:
            keys = words(self.seed, Purpose.MASK_TOP_UP, (epoch, sample_id), self.patches)
            for patch in np.argsort(keys, kind="stable").tolist():
                if not mask >> patch & 1:
                    mask |= 1 << patch
                    missing -= 1
                    if not missing:
                        break
        return mask

    def _place(self, height: int, width: int, top_word: int, left_word: int) -> int:
        """A rectangle at a uniform place inside the grid, both ends included."""
        top = below(top_word, self.height - height + 1)
        left = below(left_word, self.width - width + 1)
        return self._rectangles[height][width] << (top * self.width + left)

    def _draws(self, epoch: int, sample_id: int) -> Iterator[tuple[int, ...]]:
        """Four words at a time; longer draws of a key begin with the same words."""
        start, count = 0, _FIRST_WORDS
        while True:
            drawn = words(self.seed, Purpose.MASK, (epoch, sample_id), count).tolist()[start:]
            yield from zip(*[iter(drawn)] * _WORDS_PER_TRY, strict=True)
            start, count = count, 4 * count

    # ------------------------------------------------------------------------------------ what can be masked

    def _check(self) -> None:
        """Refuse settings under which the loops above would not end, or would leave nothing to see."""
        most = math.floor(self.threshold) + 1 if self.mode == "paper" else self.budget
        if most >= self.patches:
            field = "masking.ratio" if self.mode == "paper" else "masking.masked_patches"
            raise ConfigError(field, most, f"fewer masked patches than the {self.patches} of an image")
        if self.min_block > most:
            raise ConfigError("masking.min_block", self.min_block, f"at most the {most} masked patches")
        # A block that can be drawn from an empty mask: found on a lattice of areas and aspects, so that each
        # try finds one with a probability of at least about one in a thousand.
        steps = [(step + 0.5) / 32 for step in range(32)]
        end = self.threshold if self.mode == "paper" else self.budget
        for area in (self.min_block + (end - self.min_block) * step for step in steps):
            for aspect in (math.exp(self._log_aspect * (2 * step - 1)) for step in steps):
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                fits = 0 < height <= self._most_height and 0 < width <= self._most_width
                if fits and (self.mode == "paper" or height * width <= self.budget):
                    return
        raise ConfigError(
            "masking.min_block",
            self.min_block,
            f"blocks that fit into the {self.height}×{self.width} grid and the {most} masked patches",
            "Lower masking.min_block.",
        )

    def _paper_bound(self) -> int:
        """The most patches that mode ``paper`` can mask.

        Let m be the masked patches before the last block and T = ratio · patches, so m ≤ ⌊T⌋. The last block's
        target area is at most s(m) = max(min_block, T − m), so the mask ends with at most m + A(s(m)) patches,
        where A(s) is the largest rectangle of whole patches that a target area of at most s can be rounded to
        (:func:`smallest_areas`). The bound is the largest m + A(s(m)).
        It is reached whenever the maximum is at an m that blocks can make and the last block can miss them all.
        """
        least = smallest_areas(self._most_height, self._most_width)
        most = 0
        for masked in range(math.floor(self.threshold) + 1):
            target = max(float(self.min_block), self.threshold - masked)
            largest = max((patches for area, patches in least if area <= target), default=0)
            most = max(most, masked + largest)
        return min(most, self.patches)


def smallest_areas(most_height: int, most_width: int) -> list[tuple[float, int]]:
    """For each rectangle that a target area can be rounded to: (the smallest such area, its patches).

    A rectangle h × w comes from real sides x in [h − ½, h + ½] and y in [w − ½, w + ½] whose product is the target
    area, with 0.3 ≤ x/y ≤ 1/0.3. The product is least at the smallest x and y that the aspect allows: h − ½ and
    w − ½, the shorter one raised to 0.3 of the other if need be; if that leaves the cell, nothing rounds to h × w.
    """
    areas = []
    for height in range(1, most_height + 1):
        for width in range(1, most_width + 1):
            x, y = height - 0.5, width - 0.5
            x, y = max(x, MIN_ASPECT * y), max(y, MIN_ASPECT * x)
            if x <= height + 0.5 and y <= width + 0.5:
                areas.append((x * y, height * width))
    return areas


def _uniform(word: int) -> float:
    """A word to a float in [0, 1), as :func:`beit_dist.data.draws.uniforms` does."""
    return (word >> 11) * _UNIT


def _rectangle(height: int, width: int, grid_width: int) -> int:
    """The bits of a rectangle in the top left corner of a grid."""
    row = (1 << width) - 1
    return sum(row << (y * grid_width) for y in range(height))
