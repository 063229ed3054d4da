"""Masks of many samples drawn together: each as if it were drawn alone, by the plainest code there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.plain_masks import plain_positions

from beit_dist.config.masking import MaskingConfig
from beit_dist.errors import ConfigError
from beit_dist.stream.masking.base import smallest
from beit_dist.stream.masking.modes import MODES, masks_of

SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (14, {"masked_patches": 75}),
    (14, {}),
    (14, {"masked_patches": 75, "min_block": 75}),
    (14, {"masked_patches": 1, "min_block": 1}),
    (14, {"ratio": 0.75, "min_block": 4}),
    (7, {"min_block": 4}),
    (24, {"masked_patches": 230}),
    (16, {"masked_patches": 128, "min_block": 3}),
    ((5, 11), {"min_block": 2}),
    ((11, 5), {"min_block": 6}),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("grid", "chosen"), SETTINGS)
def test_each_mask_is_the_plain_one(mode: str, grid: Any, chosen: dict[str, Any]) -> None:
    masking = MaskingConfig(mode=mode, **chosen)
    sides = (grid, grid) if isinstance(grid, int) else grid
    masks = masks_of(masking, grid, seed=11)
    draw = np.random.default_rng(0)
    for count in (1, 3, 128):
        epochs = draw.integers(0, 1000, count).astype(np.int32)
        samples = draw.integers(0, 10**12, count)
        got = masks.positions_of(epochs, samples)
        assert got.shape == (count, masks.positions_per_image)
        assert got.dtype == np.int16
        for row, epoch, sample in zip(got, epochs.tolist(), samples.tolist(), strict=True):
            expected = plain_positions(masking, sides, 11, epoch, sample)
            assert row.tolist() == expected + [-1] * (len(row) - len(expected))


@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_masks_are_the_plain_ones(mode: str) -> None:
    """Enough for masks that need more tries than are drawn at first."""
    masking = MaskingConfig(mode=mode, masked_patches=75)
    got = masks_of(masking, 14, seed=0).positions_of([2] * 1000, range(1000))
    for sample, row in enumerate(got.tolist()):
        assert [patch for patch in row if patch >= 0] == plain_positions(masking, (14, 14), 0, 2, sample)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(list(MODES)),
    grid=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    ratio=st.floats(0.05, 0.9),
    min_block=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
    count=st.sampled_from([1, 17, 40]),
)
def test_any_settings_mask_as_the_plain_code_does(
    mode: str, grid: tuple[int, int], ratio: float, min_block: int, seed: int, count: int
) -> None:
    masking = MaskingConfig(mode=mode, ratio=ratio, min_block=min_block)
    try:
        masks = masks_of(masking, grid, seed)
    except ConfigError:
        assume(False)
    epochs = np.arange(count) % 3
    got = masks.positions_of(epochs, np.arange(count))
    for sample, row in enumerate(got.tolist()):
        expected = plain_positions(masking, grid, seed, int(epochs[sample]), sample)
        assert [patch for patch in row if patch >= 0] == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_does_not_depend_on_those_drawn_with_it(mode: str) -> None:
    masks = masks_of(MaskingConfig(mode=mode, masked_patches=75), 14, 3)
    epochs, samples = np.arange(200) % 7, np.arange(200) * 977
    together = masks.positions_of(epochs, samples)
    order = np.random.default_rng(1).permutation(200)
    np.testing.assert_array_equal(masks.positions_of(epochs[order], samples[order]), together[order])
    for part in (slice(0, 8), slice(8, 30), slice(30, 31), slice(31, 200)):
        np.testing.assert_array_equal(masks.positions_of(epochs[part], samples[part]), together[part])
    np.testing.assert_array_equal(masks.positions(int(epochs[5]), int(samples[5])), together[5])


@pytest.mark.parametrize("mode", MODES)
def test_no_samples_have_no_masks(mode: str) -> None:
    masks = masks_of(MaskingConfig(mode=mode, masked_patches=75), 14, 3)
    assert masks.positions_of([], []).shape == (0, masks.positions_per_image)


def test_the_smallest_words_are_found_also_among_equal_ones() -> None:
    draw = np.random.default_rng(2)
    words = draw.integers(0, 6, (200, 30)).astype(np.uint64)  # equal ones everywhere
    numbers = draw.integers(1, 31, 200)
    for row, chosen, number in zip(words, smallest(words, numbers), numbers, strict=True):
        assert np.flatnonzero(chosen).tolist() == sorted(np.argsort(row, kind="stable")[:number].tolist())
    assert (smallest(words, 7).sum(axis=1) == 7).all()
