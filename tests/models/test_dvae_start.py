"""A start from clusters: the first weights make tokens and draw them."""

from __future__ import annotations

import pytest
import torch

from beit_dist.config.dvae import DVAEConfig
from beit_dist.models.dvae import DVAE
from beit_dist.models.dvae_start import start_from_clusters


def drawings(count: int, seed: int) -> torch.Tensor:
    """Images uint8 ``(count, 3, 32, 32)`` of squares in one colour each, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = 0.02 * torch.randn(colours.shape, generator=generator)
    return ((colours + noise).clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("sizes", [(32, 8, 16), (32, 8, 64), (7, 12, 8)], ids=["narrow", "wide", "odd"])
def test_untrained_it_uses_its_tokens_and_draws_the_colours(sizes: tuple[int, int, int]) -> None:
    vocabulary, hidden, decoder_input = sizes
    config = DVAEConfig(vocabulary=vocabulary, hidden=hidden, blocks_per_group=1, decoder_input=decoder_input)
    images, others = drawings(64, 0), drawings(16, 1)
    noise, model = DVAE(config, seed=1), DVAE(config, seed=1)
    start_from_clusters(model, images, seed=0)

    def error(dvae: DVAE) -> float:
        return float((dvae.decode(dvae.tokens(others)) - others / 255).square().mean())

    assert torch.unique(model.tokens(others)).numel() > 0.8 * vocabulary
    assert error(model) < error(noise) / 2
    assert error(model) < 0.6 * float((others / 255).var())


def test_it_depends_on_images_and_seed_alone_and_tells_what_it_set() -> None:
    config = DVAEConfig(vocabulary=16, hidden=8, blocks_per_group=1, decoder_input=8)
    models = [DVAE(config, seed=1) for _ in range(3)]
    first, second, other = (
        start_from_clusters(model, drawings(16, 0), seed) for model, seed in zip(models, (0, 0, 1), strict=True)
    )
    untouched = DVAE(config, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.blocks.output.conv.w"], other["encoder.blocks.output.conv.w"])
    changed = {name for name, was in untouched.items() if not torch.equal(was, models[0].state_dict()[name])}
    assert changed <= set(first)
    assert all(values.isfinite().all() for values in first.values())


def test_images_of_one_colour_are_no_reason_to_fail() -> None:
    config = DVAEConfig(vocabulary=16, hidden=8, blocks_per_group=1, decoder_input=8)
    model = DVAE(config, seed=1)
    first = start_from_clusters(model, torch.full((8, 3, 16, 16), 200, dtype=torch.uint8), seed=0)
    assert all(values.isfinite().all() for values in first.values())
