"""Blocks of random size and shape, placed on a grid: what the modes of the paper and of its code share.

Many masks are made at once. A round looks at the next tries of each mask that is not finished, all as if nothing
were placed before them, and places the first block that is accepted; the tries behind it wait for the next round.
Once few masks are left, NumPy's calls cost more than they save, and each mask is finished by itself.

A mask is a row of bits in 64-bit words, or one Python integer with the same bits. A block is the overlap of a band
of rows and a band of columns.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.draws import Integers, Purpose, Words, below, below_each, uniforms, words_of
from beit_dist.errors import ConfigError
from beit_dist.stream.masking.base import Bools, Masks

MIN_ASPECT = 0.3
"""Least ratio of a block's sides; the greatest is its inverse (unilm's default and the paper's Algorithm 1)."""

_WORDS_PER_TRY = 4  # area, aspect, top, left
_AHEAD = np.arange(5)[:, None]  # the tries of a mask that a round looks at; nearly always, one of them is accepted
_MANY = 20  # masks for which rounds are faster than each mask by itself
_FEW = 8  # masks that are left, for which a round takes longer than finishing each of them


class BlockMasks(Masks):
    """Blocks on a grid, tried one after another.

    A try draws an area between ``min_block`` and ``area_total`` less the patches that are masked so far, an aspect
    (:meth:`aspects`) and a place. It is accepted if the block fits, masks at least one more patch, and leaves at
    most ``most`` masked. A mask is finished when ``enough`` patches are masked, or when ``patience`` tries have
    failed in a row; or twice, thrice, ... as many while nothing is masked.

    A subclass sets these numbers and calls :meth:`check_blocks`.
    """

    spans_grid: ClassVar[bool]
    """Whether a block may be as high or as wide as the grid."""
    patience: ClassVar[int]
    """A multiple of five; 0 for one without end."""
    first_tries: ClassVar[int]
    """Tries that are drawn at once; those of the rare masks that need more are drawn again."""
    area_total: float
    enough: int
    most: int

    def __init__(self, masking: MaskingConfig, grid: int | tuple[int, int], seed: int) -> None:
        super().__init__(masking, grid, seed)
        self.min_block = masking.min_block
        self.most_height = self.height if self.spans_grid else self.height - 1
        self.most_width = self.width if self.spans_grid else self.width - 1
        self._words = -(-self.patches // 64)
        self._bands = _bands(self.height, self.width, 0), _bands(self.height, self.width, 1)
        self._band_numbers = [
            [int.from_bytes(band.tobytes(), "little") for band in bands] for bands in self._bands
        ]
        # One more than each side: how many places an edge has in it, and the bands of one size in a table.
        self._edges = np.array([self.height + 1, self.width + 1], np.uint64)[:, None, None]
        self._most_sides = np.array([self.most_height, self.most_width], np.float64)[:, None, None]

    @abstractmethod
    def aspects(self, units: NDArray[np.float64]) -> NDArray[np.float64]:
        """Height over width of blocks, from uniform numbers in [0, 1)."""

    def masked(self, epochs: Integers, sample_ids: Integers) -> Bools:
        """The patches under the blocks."""
        bits = self._blocks(epochs, sample_ids).astype("<u8", copy=False).view(np.uint8)
        return np.unpackbits(bits, axis=1, count=self.patches, bitorder="little").view(np.bool_)

    def _blocks(self, epochs: Integers, sample_ids: Integers) -> Words:
        """(n, words) bits: patch p is bit p mod 64 of word p // 64."""
        count, drawn = len(epochs), self.first_tries
        tries = self._tries(epochs, sample_ids, drawn)
        masks = np.zeros((count, self._words), np.uint64)
        sizes, used, failed = np.zeros((3, count), np.int64)  # patches; tries; tries since the last block
        unfinished = np.ones(count, np.bool_)
        rows = np.arange(count if count >= _MANY else 0)
        while len(rows) >= _FEW:
            mask, size, begin = masks[rows], sizes[rows], used[rows]
            found, tried, gains, blocks = self._round(tries, rows * drawn + begin, drawn - begin, mask, size)
            masks[rows] = mask | blocks * found[:, None]
            sizes[rows] = size = size + gains * found
            used[rows] = begin = begin + tried
            failed[rows] = waited = (failed[rows] + tried) * ~found
            going = size < self.enough
            if self.patience:
                going &= (waited % self.patience > 0) | found | (size == 0)
            unfinished[rows] = going
            rows = rows[going & (begin < drawn)]
        for row in np.flatnonzero(unfinished).tolist():
            rest = tries[:, row * drawn + used[row] : (row + 1) * drawn]
            key = epochs[row : row + 1], sample_ids[row : row + 1]
            masks[row] = self._finished(masks[row], rest, int(used[row]), int(failed[row]), *key)
        return masks

    def _tries(self, epochs: Integers, sample_ids: Integers, count: int) -> Words:
        """(4, n · count): the bits of a uniform float64 and of an aspect, and the words for top and left.

        More tries of a sample begin with the same ones.
        """
        drawn = words_of(self.seed, Purpose.MASK, (epochs, sample_ids), count * _WORDS_PER_TRY)
        tries = np.ascontiguousarray(drawn.reshape(-1, _WORDS_PER_TRY).T)
        floats = tries[:2].view(np.float64)
        floats[:] = uniforms(tries[:2])
        floats[1] = self.aspects(floats[1])
        return tries

    def _round(
        self, tries: Words, begin: Integers, left: Integers, masks: Words, sizes: Integers
    ) -> tuple[Bools, Integers, Integers, Words]:
        """The first accepted of the next few tries of n masks.

        Args:
            tries: see :meth:`_tries`.
            begin: (n,) where the next ones of each mask are.
            left: (n,) how many there are, 1 or more.
            masks: (n, words).
            sizes: (n,) masked patches.

        Returns:
            (n,) whether there is one, (n,) how many tries it took, (n,) how many patches it adds, (n, words) its
            patches. The last two are of any block where there is none.
        """
        count = len(begin)
        drawn = tries.take(_AHEAD + begin, axis=1, mode="clip")  # (4, 5, n): rows of n are long, so NumPy is fast
        units, aspects = drawn[:2].view(np.float64)
        areas = (self.area_total - sizes - self.min_block) * units
        areas += self.min_block
        sides = np.empty((2, *areas.shape))
        np.multiply(areas, aspects, out=sides[0])
        np.divide(areas, aspects, out=sides[1])
        np.rint(np.sqrt(sides, out=sides), out=sides)
        fits = sides <= self._most_sides
        accepted = fits[0] & fits[1]
        whole = sides.astype(np.int64).view(np.uint64)
        bands = below_each(drawn[2:], self._edges - whole)
        whole *= self._edges
        bands += whole
        high, wide = bands.view(np.int64)  # of blocks that do not fit, these can be any numbers
        blocks = self._bands[0].take(high, axis=0, mode="clip")
        blocks &= self._bands[1].take(wide, axis=0, mode="clip")
        ones = np.bitwise_count(blocks & ~masks)
        gains = ones[..., 0].astype(np.int64)
        for word in range(1, self._words):
            gains += ones[..., word]
        accepted &= gains > 0
        accepted &= gains <= self.most - sizes
        accepted &= left > _AHEAD
        first = accepted.argmax(axis=0)
        best = first * count + np.arange(count)
        found = accepted.reshape(-1).take(best)
        tried = np.where(found, first + 1, np.minimum(left, len(_AHEAD)))
        return found, tried, gains.reshape(-1).take(best), blocks.reshape(-1, self._words).take(best, axis=0)

    def _finished(
        self, mask: Words, tries: Words, used: int, failed: int, epoch: Integers, sample_id: Integers
    ) -> Words:
        """One mask, (words,), after all its tries; ``tries`` are those left of what is drawn."""
        bits = int.from_bytes(mask.astype("<u8", copy=False).tobytes(), "little")
        size, drawn = bits.bit_count(), used + tries.shape[1]
        (rows, columns), sqrt = self._band_numbers, math.sqrt
        height_edges, width_edges = self.height + 1, self.width + 1
        while True:
            floats, places = tries[:2].view(np.float64).tolist(), tries[2:].tolist()
            for unit, aspect, top_word, left_word in zip(*floats, *places, strict=True):
                area = self.min_block + (self.area_total - size - self.min_block) * unit
                height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
                if height <= self.most_height and width <= self.most_width:
                    top, left = below(top_word, height_edges - height), below(left_word, width_edges - width)
                    block = rows[height * height_edges + top] & columns[width * width_edges + left]
                    gain = (block & ~bits).bit_count()
                    if 0 < gain <= self.most - size:
                        bits |= block
                        size += gain
                        if size >= self.enough:
                            return self._in_words(bits)
                        failed = 0
                        continue
                failed += 1
                # The released code gives up with nothing masked, too.
                if self.patience and failed % self.patience == 0 and size:
                    return self._in_words(bits)
            tries, drawn = self._tries(epoch, sample_id, 2 * drawn)[:, drawn:], 2 * drawn

    def _in_words(self, bits: int) -> Words:
        return np.frombuffer(bits.to_bytes(8 * self._words, "little"), "<u8")

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


def _bands(height: int, width: int, axis: int) -> NDArray[Any]:
    """Bits of whole rows (axis 0) or columns (axis 1) of a grid: ((side + 1)², words).

    The band of ``size`` rows or columns from ``start`` on is at ``size · (side + 1) + start``.
    """
    side = (height, width)[axis]
    size, start, at = np.ogrid[: side + 1, : side + 1, :side]
    inside = ((start <= at) & (at < start + size)).reshape(-1, side)
    grids = np.broadcast_to(np.expand_dims(inside, 2 - axis), (len(inside), height, width))
    bits = np.zeros((len(inside), -(-height * width // 64) * 64), np.bool_)
    bits[:, : height * width] = grids.reshape(len(inside), -1)
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")
