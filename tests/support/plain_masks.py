"""Masks drawn one after another, by the plainest loops: what drawing many at once must agree with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.reading import exact
from beit_dist.draws import Purpose, below, permutation, words

_MIN_ASPECT = 0.3
_TRIES_PER_BLOCK = 10
_UNIT = 2.0**-53


def plain_positions(
    masking: MaskingConfig, grid: tuple[int, int], seed: int, epoch: int, sample: int
) -> list[int]:
    """The masked patches, ascending, of a sample in an epoch.

    Args:
        masking: the mode and its settings.
        grid: height and width in patches.
        seed: of the run.
        epoch: of the mask.
        sample: its id.
    """
    patches = grid[0] * grid[1]
    budget = masking.masked_patches or math.ceil(exact(masking.ratio) * patches)
    if masking.mode == "random":
        order = permutation(seed, Purpose.RANDOM_MASK, (epoch, sample), patches)
        return sorted(order[:budget].tolist())
    tries = _tries(seed, epoch, sample)
    if masking.mode == "paper":
        return sorted(_paper(masking, grid, tries))
    masked = _released(masking.min_block, budget, grid, tries)
    if masking.mode == "exact":
        keys = words(seed, Purpose.MASK_TOP_UP, (epoch, sample), patches)
        for patch in np.argsort(keys, kind="stable").tolist():
            if len(masked) < budget:
                masked.add(patch)
    return sorted(masked)


def _tries(seed: int, epoch: int, sample: int) -> Iterator[tuple[int, int, int, int]]:
    drawn = words(seed, Purpose.MASK, (epoch, sample), 16_000).tolist()
    yield from zip(*[iter(drawn)] * 4, strict=True)


def _block(grid: tuple[int, int], height: int, width: int, top_word: int, left_word: int) -> set[int]:
    top, left = below(top_word, grid[0] - height + 1), below(left_word, grid[1] - width + 1)
    return {y * grid[1] + x for y in range(top, top + height) for x in range(left, left + width)}


def _released(min_block: int, budget: int, grid: tuple[int, int], tries: Iterator[tuple[int, ...]]) -> set[int]:
    """The loop of unilm's ``masking_generator.py``, without end while nothing is masked."""
    masked: set[int] = set()
    failed = 0
    log_aspect = math.log(1 / _MIN_ASPECT)
    while len(masked) < budget:
        area_word, aspect_word, top_word, left_word = next(tries)
        left = budget - len(masked)
        area = min_block + (left - min_block) * ((area_word >> 11) * _UNIT)
        aspect = math.exp(-log_aspect + 2 * log_aspect * _UNIT * (aspect_word >> 11))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < grid[0] and width < grid[1]:
            more = _block(grid, height, width, top_word, left_word) - masked
            if 0 < len(more) <= left:
                masked |= more
                failed = 0
                continue
        failed += 1
        if failed == _TRIES_PER_BLOCK:
            if masked:
                break
            failed = 0
    return masked


def _paper(masking: MaskingConfig, grid: tuple[int, int], tries: Iterator[tuple[int, ...]]) -> set[int]:
    """Algorithm 1 of arXiv 2106.08254."""
    masked: set[int] = set()
    patches = grid[0] * grid[1]
    while len(masked) <= math.floor(exact(masking.ratio) * patches):
        area_word, aspect_word, top_word, left_word = next(tries)
        left = masking.ratio * patches - len(masked)
        area = masking.min_block + (left - masking.min_block) * ((area_word >> 11) * _UNIT)
        aspect = _MIN_ASPECT + (1 / _MIN_ASPECT - _MIN_ASPECT) * ((aspect_word >> 11) * _UNIT)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height <= grid[0] and width <= grid[1]:
            masked |= _block(grid, height, width, top_word, left_word)
    return masked
