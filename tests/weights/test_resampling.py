"""Positions of another resolution are those of the original's SciPy spline, without SciPy."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from support.torchvision_stub import stand_in_for_torchvision

from beit_dist.weights.resampling import _geometric, _spline, grid_of_table, resample_positions, resample_table


def test_the_spline_is_exact_for_cubics_and_goes_on_flat_outside() -> None:
    knots = np.array([-4.0, -1.5, -0.5, 0.0, 1.0, 2.5, 4.0])
    at = np.linspace(-5, 5, 41)
    inside = np.clip(at, -4, 4)

    def cubic(x: np.ndarray) -> np.ndarray:
        return 0.3 * x**3 - x**2 + 2 * x - 1

    np.testing.assert_allclose(_spline(knots, at) @ cubic(knots), cubic(inside), atol=1e-12)
    np.testing.assert_allclose(_spline(knots, knots), np.eye(7), atol=1e-12)


@pytest.mark.parametrize(("source", "target"), [(27, 47), (27, 63), (27, 31)])
def test_old_offsets_lie_on_a_geometric_grid_that_ends_at_the_new_edge(source: int, target: int) -> None:
    knots = _geometric(source, target)
    steps = np.diff(knots[source // 2 :])
    ratios = steps[1:] / steps[:-1]
    assert (len(knots), knots[source // 2], steps[0]) == (source, 0, 1)
    np.testing.assert_allclose(ratios, ratios[0])
    assert knots[-1] == pytest.approx(target // 2, abs=1e-3)


def a_table(grid: int, heads: int = 3) -> torch.Tensor:
    """A smooth table with some noise, as trained ones are."""
    side, generator = 2 * grid - 1, torch.Generator().manual_seed(grid)
    offset = (torch.arange(float(side)) - side // 2) / side
    waves = [torch.cos(9 * offset[:, None] + head) for head in range(heads)]
    smooth = torch.stack([wave * torch.exp(-4 * offset[None].abs()) for wave in waves])
    noisy = smooth + 0.1 * torch.randn(heads, side, side, generator=generator)
    return torch.cat((noisy.flatten(1).t(), torch.randn(3, heads, generator=generator)))


GRIDS = pytest.mark.parametrize(("source", "target"), [(14, 24), (14, 32), (14, 7), (14, 16), (24, 14), (7, 24)])


@GRIDS
def test_a_resampled_table_has_scipys_values(source: int, target: int) -> None:
    """The original calls interp2d(kind="cubic"), which SciPy has removed: the same spline of FITPACK."""
    interpolate = pytest.importorskip("scipy.interpolate")
    table = a_table(source)
    got = resample_table(table, target)
    old, new = 2 * source - 1, 2 * target - 1
    assert got.shape == (new * new + 3, 3)
    assert torch.equal(got[-3:], table[-3:])
    knots, at = original_knots(old, new), np.arange(new) - new // 2.0
    inside = np.clip(at, knots[0], knots[-1])  # beyond its knots FITPACK goes on with the value at the last one
    for head in range(3):
        values = table[:-3, head].double().numpy().reshape(old, old)
        expected = interpolate.RectBivariateSpline(knots, knots, values, kx=3, ky=3, s=0)(inside, inside)
        np.testing.assert_allclose(got[:-3, head].numpy().reshape(new, new), expected, atol=2e-6)


def original_knots(source: int, target: int) -> list[float]:
    """The original's loop, from its description: ratio by bisection, distances added up one by one."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        ratio = (left + right) / 2
        reached = sum(ratio**power for power in range(source // 2))
        left, right = (left, ratio) if reached > target // 2 else (ratio, right)
    distances, at = [], 1.0
    for power in range(source // 2):
        distances.append(at)
        at += ratio ** (power + 1)
    return [-distance for distance in reversed(distances)] + [0.0] + distances


@GRIDS
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_timms_linear_resampling_is_near_and_uses_the_same_grid(
    source: int, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("pip install --no-deps timm")
    stand_in_for_torchvision(monkeypatch)
    from timm.layers import resize_rel_pos_bias_table

    offsets = (torch.arange(2.0 * source - 1) - source + 1) / source
    plane = 3 * offsets[:, None] - 2 * offsets[None]  # both are exact where linear is; noise would differ
    table = torch.cat((plane.reshape(-1, 1).repeat(1, 2), torch.tensor([[1.0, 2.0]] * 3)))
    theirs = resize_rel_pos_bias_table(table, (target, target), ((2 * target - 1) ** 2 + 3, 2))
    ours = resample_table(table, target)
    assert torch.equal(theirs[-3:], ours[-3:])
    middle = slice(1, -1)  # timm extrapolates at the edge, by less than a thousandth of a step
    side = 2 * target - 1
    got, expected = (t[:-3, 0].view(side, side)[middle, middle] for t in (ours, theirs))
    assert (got - expected).abs().max() < 0.05 * float(table[:-3].abs().max())


def test_positions_are_resized_bicubically_but_for_the_class_tokens() -> None:
    positions = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(0))
    assert resample_positions(positions, 4) is positions
    got = resample_positions(positions, 6)
    assert got.shape == (1, 37, 8)
    assert torch.equal(got[:, 0], positions[:, 0])
    ramp = torch.arange(14.0).view(14, 1).expand(14, 14).reshape(1, 196, 1)
    resized = resample_positions(torch.cat((torch.zeros(1, 1, 1), ramp), 1), 28)[0, 1:, 0].view(28, 28)
    assert (resized.diff(dim=0)[3:-3] > 0.3).all()  # rows stay rows, in their order
    assert torch.allclose(resized.diff(dim=1), torch.zeros(28, 27), atol=1e-5)


def test_tables_of_no_square_grid_are_refused() -> None:
    assert (grid_of_table(732), grid_of_table(2212)) == (14, 24)
    with pytest.raises(ValueError, match="733 rows"):
        grid_of_table(733)
