"""Masks: keyed, never empty, never longer than promised, and distributed as the released code's are."""

from __future__ import annotations

import math
import pickle
import random
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.errors import ConfigError
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.masking.modes import MODES, masks_of
from beit_dist.stream.masking.paper import smallest_areas
from beit_dist.stream.masking.released import OriginalMasks

MANY = 6000


def generator(mode: str, grid: int = 14, patches: int = 75, seed: int = 0) -> Masks:
    return masks_of(MaskingConfig(mode=mode, masked_patches=patches), grid, seed)


def as_grids(masks: Masks, count: int) -> NDArray[np.bool_]:
    """bool (count, height, width)."""
    grids = np.zeros((count, masks.patches), bool)
    for sample in range(count):
        positions = masks.positions(sample % 3, sample)
        grids[sample, positions[positions >= 0]] = True
    return grids.reshape(count, masks.height, masks.width)


@lru_cache
def many(mode: str) -> NDArray[np.bool_]:
    return as_grids(generator(mode), MANY)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [7, 14, 16, 32])
def test_positions_are_ascending_then_padded_and_never_empty(mode: str, grid: int) -> None:
    masks = generator(mode, grid, patches=0)
    for sample in range(200):
        positions = masks.positions(1, sample)
        assert positions.dtype == np.int16
        assert len(positions) == masks.positions_per_image
        count = int((positions >= 0).sum())
        assert count > 0
        assert (np.diff(positions[:count]) > 0).all()
        assert positions[count - 1] < grid**2
        assert (positions[count:] == -1).all()
        if mode in ("exact", "random"):
            assert count == len(positions) == math.ceil(0.4 * grid**2)
        if mode == "paper":
            assert count > 0.4 * grid**2


def test_the_original_is_distributed_as_the_released_code() -> None:
    """Figures of 4,000 masks of an independent sampler of that code; tolerances are 4 deviations or more."""
    counts = many("original").sum((1, 2))
    assert (counts == 75).mean() == pytest.approx(0.675, abs=0.04)
    assert (counts == 74).mean() == pytest.approx(0.228, abs=0.035)
    assert (counts == 73).mean() == pytest.approx(0.046, abs=0.02)
    assert (counts < 70).mean() == pytest.approx(0.003, abs=0.005)
    assert counts.mean() == pytest.approx(74.49, abs=0.1)
    assert counts.max() == 75
    assert counts.min() >= 60


@pytest.mark.parametrize("mode", ["original", "exact"])
def test_masks_are_dense_in_the_centre_and_reach_the_edges(mode: str) -> None:
    often = many(mode).mean(0)
    corners = often[[0, 0, -1, -1], [0, -1, 0, -1]]
    edges = [often[0, 6:8], often[-1, 6:8], often[6:8, 0], often[6:8, -1]]
    assert corners == pytest.approx(np.full(4, 0.04), abs=0.02)
    assert np.array(edges) == pytest.approx(np.full((4, 2), 0.19), abs=0.025)
    assert often[6:8, 6:8] == pytest.approx(np.full((2, 2), 0.72), abs=0.03)
    assert often[-1].min() > 0.02  # exclusive bounds of the placement would leave these at 0
    assert often[:, -1].min() > 0.02


def test_the_original_agrees_with_a_plain_sampler_of_the_same_rules() -> None:
    expected = np.array([plain_original(random.Random(seed)) for seed in range(1500)])
    often, expected_often = many("original").mean(0), expected.mean(0)
    assert abs(often - expected_often).max() < 0.07  # 5 deviations of a difference of such means
    assert abs(often - expected_often).mean() < 0.015


def plain_original(draw: random.Random) -> NDArray[np.bool_]:
    """The rules of the reference notes with arrays and Python's generator."""
    mask = np.zeros((14, 14), bool)
    while mask.sum() < 75:
        budget, before = 75 - mask.sum(), mask.sum()
        for _ in range(10):
            area = draw.uniform(16, budget)
            aspect = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width < 14 and height < 14:
                top, left = draw.randint(0, 14 - height), draw.randint(0, 14 - width)
                block = mask[top : top + height, left : left + width]
                if 0 < height * width - block.sum() <= budget:
                    block[:] = True
                    break
        if mask.sum() == before:
            break
    return mask


def test_no_block_of_the_original_spans_the_grid() -> None:
    masks = OriginalMasks(MaskingConfig(masked_patches=9, min_block=9), 4, 0)
    first_blocks = as_grids(masks, 300)  # 9 patches are one block: 3×3, or smaller ones side by side
    assert not (first_blocks.all(1).any(1) & (first_blocks.sum((1, 2)) <= 4)).any()
    assert max(masks.most_height, masks.most_width) == 3


def test_the_paper_masks_more_than_the_ratio() -> None:
    counts = many("paper").sum((1, 2))
    assert counts.min() == 79
    assert counts.mean() == pytest.approx(82.5, abs=0.25)
    assert 94 <= counts.max() <= generator("paper").positions_per_image == 98


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    ratio=st.floats(0.05, 0.95),
    min_block=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    mode=st.sampled_from(sorted(MODES)),
)
def test_no_mask_is_longer_than_its_row(
    grid: tuple[int, int], ratio: float, min_block: int, seed: int, mode: str
) -> None:
    try:
        masks = masks_of(MaskingConfig(mode=mode, ratio=ratio, min_block=min_block), grid, seed)
    except ConfigError:
        assume(False)
    for sample in range(25):
        positions = masks.positions(0, sample)
        assert len(positions) == masks.positions_per_image <= masks.patches
        assert positions[0] >= 0


def test_the_paper_bound_knows_the_rectangles_that_areas_round_to() -> None:
    draw = random.Random(0)
    for target in (1.0, 7.0, 16.0, 33.3, 60.0):
        rounded = set()
        for _ in range(30_000):
            area = target * draw.random()
            aspect = draw.uniform(0.3, 1 / 0.3)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height <= 14 and 0 < width <= 14:
                rounded.add(height * width)
        assert {patches for area, patches in smallest_areas(14, 14) if area < target * 0.97} <= rounded
        assert rounded <= {patches for area, patches in smallest_areas(14, 14) if area <= target}


def test_exact_is_the_original_topped_up() -> None:
    original, exact = many("original"), many("exact")
    assert (exact.sum((1, 2)) == 75).all()
    assert (exact | original == exact).all()
    added = (exact & ~original).sum((1, 2))
    assert 0.28 < (added > 0).mean() < 0.38
    where = (exact & ~original).sum(0) / (~original).sum(0)
    assert where.max() < 5 * where.mean()  # anywhere, not at the first free patches


@pytest.mark.parametrize("mode", ["original", "exact"])
def test_a_small_budget_never_leaves_a_mask_empty(mode: str) -> None:
    masks = generator(mode, patches=16)
    counts = as_grids(masks, 500).sum((1, 2))
    assert counts.min() > 0
    assert counts.max() <= 16


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_depends_on_seed_epoch_and_sample_only(mode: str) -> None:
    masks = generator(mode)
    expected = masks.positions(2, 7)
    for sample in range(50):
        masks.positions(0, sample)
    assert (masks.positions(2, 7) == expected).all()
    assert (pickle.loads(pickle.dumps(masks)).positions(2, 7) == expected).all()
    for other in (masks.positions(3, 7), masks.positions(2, 8), generator(mode, seed=1).positions(2, 7)):
        assert (other != expected).any()


@pytest.mark.parametrize("mode", MODES)
def test_masks_are_pinned(mode: str) -> None:
    positions = masks_of(MaskingConfig(mode=mode, min_block=4), 6, 3).positions(5, 4067)
    assert positions.tolist() == PINNED[mode]


def test_random_masks_every_patch_and_every_pair_alike() -> None:
    grids = many("random").reshape(MANY, 196)
    chance = 75 / 196
    deviation = math.sqrt(chance * (1 - chance) / MANY)
    assert abs(grids.mean(0) - chance).max() < 5 * deviation
    together = grids.T.astype(float) @ grids / MANY  # every pair of patches, the same one twice on the diagonal
    pair = chance * 74 / 195
    apart = ~np.eye(196, dtype=bool)
    assert abs(together[apart] - pair).max() < 6 * math.sqrt(pair * (1 - pair) / MANY)
    assert together[apart].std() == pytest.approx(math.sqrt(pair * (1 - pair) / MANY), rel=0.1)


def test_random_masks_of_neighbouring_keys_have_no_more_in_common_than_chance() -> None:
    masks = generator("random")
    first = as_grids(masks, 1000).reshape(1000, -1)
    other = as_grids(generator("random", seed=1), 1000).reshape(1000, -1)
    expected = pytest.approx(75 * 75 / 196, abs=0.6)  # 5 deviations of such a mean
    assert (first & other).sum(1).mean() == expected
    assert (first[1:] & first[:-1]).sum(1).mean() == expected
    epochs = [set(masks.positions(0, n).tolist()) & set(masks.positions(1, n).tolist()) for n in range(1000)]
    assert np.mean([len(shared) for shared in epochs]) == expected


def test_a_ratio_is_the_decimal_number_that_was_written() -> None:
    """0.55 · 100 is 55.00000000000001 in binary, and 0.29 · 100 is 28.999999999999996."""
    assert len(masks_of(MaskingConfig(mode="random", ratio=0.55), 10, 0).positions(0, 0)) == 55
    assert len(masks_of(MaskingConfig(ratio=0.28, min_block=4), 5, 0).positions(0, 0)) == 7
    paper = masks_of(MaskingConfig(mode="paper", ratio=0.29), 10, 0)
    assert as_grids(paper, 400).sum((1, 2)).min() == 30
    assert paper.describe().startswith("30 to ")


def test_the_default_ratio_masks_as_many_patches_as_before_on_every_grid() -> None:
    for grid in range(7, 65):
        assert generator("exact", grid, patches=0).positions_per_image == math.ceil(0.4 * grid**2)


def test_settings_of_another_mode_do_not_matter() -> None:
    for mode, ignored in (("random", {"min_block": 5000, "ratio": 0.99}), ("paper", {"masked_patches": 9999})):
        plain = MaskingConfig(mode=mode, **({"masked_patches": 75} if mode == "random" else {}))
        other = plain.model_copy(update=ignored)
        assert not MODES[mode].uses(plain) & ignored.keys()
        same = (masks_of(masking, 14, 0).positions(0, 3).tolist() for masking in (plain, other))
        assert next(same) == next(same)


def test_the_ratio_matters_where_no_budget_is_given() -> None:
    for mode in ("exact", "original", "random"):
        assert "ratio" in MODES[mode].uses(MaskingConfig())
        assert "ratio" not in MODES[mode].uses(MaskingConfig(masked_patches=75))


def test_each_mode_says_how_much_it_masks() -> None:
    blocks = "blocks of at least 16"
    assert generator("exact").describe() == f"75 of 196 patches, {blocks}"
    assert generator("original").describe() == f"at most 75 of 196 patches, {blocks}"
    assert generator("paper").describe() == f"79 to 98 of 196 patches, {blocks}"
    assert generator("random").describe() == "75 of 196 patches, drawn one by one"


@pytest.mark.parametrize(
    ("settings", "grid", "said"),
    [
        ({"mode": "exakt"}, 14, r"masking\.mode: got 'exakt', expected one of exact, .* Did you mean exact\?"),
        ({"masked_patches": 49}, 7, r"masking\.masked_patches: got 49, .*fewer masked patches than the 49"),
        ({"mode": "random", "masked_patches": 200}, 14, "fewer masked patches than the 196"),
        ({"mode": "random", "ratio": 0.99}, 7, r"masking\.ratio: got 49, .*fewer masked patches than the 49"),
        ({"mode": "paper", "ratio": 0.99}, 7, r"masking\.ratio: got 49, .*fewer masked patches than the 49"),
        ({"masked_patches": 15}, 14, r"masking\.min_block: got 16, expected at most the 15 masked patches"),
        ({"min_block": 90}, 14, r"masking\.min_block: got 90, expected at most the 79 masked patches"),
        ({"masked_patches": 30, "min_block": 30}, (2, 20), r"Lower masking\.min_block"),
    ],
)
def test_impossible_masks_are_refused(settings: dict[str, Any], grid: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        masks_of(MaskingConfig(**settings), grid, 0)


PINNED = {
    "exact": [1, 2, 3, 4, 7, 8, 9, 10, 11, 13, 14, 15, 16, 19, 28],
    "original": [1, 2, 3, 4, 7, 8, 9, 10, 13, 14, 15, 16, 19, -1, -1],
    "paper": [1, 2, 3, 4, 7, 8, 9, 10, 13, 14, 15, 16, 20, 21, 22, -1, -1, -1, -1, -1],
    "random": [1, 3, 8, 10, 12, 15, 16, 17, 19, 20, 22, 24, 25, 30, 34],
}
