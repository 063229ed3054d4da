"""Clusters, and the baselines that they give a tokenizer's PSNR."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2, vq

from beit_dist.models.clusters import k_means, nearest
from beit_dist.models.palette import single_colours


def blobs(seed: int, each: int = 50) -> torch.Tensor:
    """Points around the eight corners of a cube."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    return (corners[:, None] + 0.02 * torch.randn(8, each, 3, generator=generator)).flatten(0, 1)


def test_k_means_is_scipys_from_the_same_centres() -> None:
    points = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    first = k_means(points, 7, rounds=0)
    expected, _ = kmeans2(points.numpy(), first.numpy(), iter=12, minit="matrix")
    centres = k_means(points, 7, rounds=12)
    np.testing.assert_allclose(centres.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(nearest(points, centres).numpy(), vq(points.numpy(), centres.numpy())[0])


def test_k_means_is_the_same_every_time_and_starts_from_points_that_differ() -> None:
    points = torch.cat([torch.zeros(10_000, 3), blobs(0)])
    assert torch.equal(k_means(points, 16, seed=3), k_means(points, 16, seed=3))
    assert not torch.equal(k_means(points, 16, seed=3), k_means(points, 16, seed=4))
    assert len(torch.unique(k_means(points, 16), dim=0)) == 16
    assert len(k_means(torch.zeros(3, 2), 5)) == 5, "fewer points than clusters"


def test_the_baselines_are_those_of_painted_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    training, measured = (
        torch.randint(0, 256, (count, 3, 32, 24), generator=generator, dtype=torch.uint8) for count in (40, 5)
    )
    found = single_colours(training, measured, vocabulary=9)

    def means(images: torch.Tensor) -> torch.Tensor:
        squares = images.double().div(255).unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5))
        return squares.permute(0, 2, 3, 1)

    exact = means(measured)
    order = torch.randperm(40 * 12, generator=torch.Generator().manual_seed(0))
    palette = k_means(means(training).reshape(-1, 3).float()[order], 9)
    painted = palette[nearest(exact.reshape(-1, 3).float(), palette)].view_as(exact).double()
    for colours, psnr in ((painted, found.palette), (exact, found.mean_colour)):
        drawn = colours.permute(0, 3, 1, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
        error = (drawn - measured.double() / 255).square().mean()
        assert psnr == pytest.approx(-10 * float(torch.log10(error)), abs=1e-3)
    assert found.mean_colour > found.palette


def test_more_colours_come_nearer_and_never_past_the_exact_ones() -> None:
    flat = (blobs(1, 30).clamp(0, 1) * 255).to(torch.uint8)[..., None, None].expand(-1, -1, 8, 8)
    few, many = (single_colours(flat[::2], flat[1::2], count) for count in (2, 8))
    assert few.palette + 5 < many.palette < many.mean_colour
    assert many.mean_colour == 100, "images of one colour are drawn exactly"
