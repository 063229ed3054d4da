"""Positions of another resolution are those of the original's SciPy spline, without SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from beit_dist.models.resampling import _geometric, _spline, grid_of_table, resample_positions, resample_table


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


def test_a_table_resampled_from_224_to_384_pixels_has_scipys_values() -> None:
    """Pinned: SciPy 1.17 RectBivariateSpline (s=0) on the same grid, which is what interp2d called."""
    offset = torch.arange(27.0) - 13
    table = torch.cos(offset[:, None] / 3) * torch.exp(-offset[None, :].abs() / 5)
    got = resample_table(torch.cat((table.reshape(-1, 1), torch.tensor([[1.0], [2.0], [3.0]]))), 24)
    assert got.shape == (47 * 47 + 3, 1)
    assert got[-3:, 0].tolist() == [1.0, 2.0, 3.0]
    square = got[:-3, 0].view(47, 47)
    expected = [-0.0274844, -0.3184123, 1.0, 0.8187308, -0.0967708]
    assert [float(square[y, x]) for y, x in ((0, 0), (10, 30), (23, 23), (23, 24), (40, 5))] == pytest.approx(
        expected, abs=2e-6
    )


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
