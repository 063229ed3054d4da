"""Mixup and CutMix: the same for any ranks and restarts, with the shares that the pixels have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from beit_dist.config.finetuning import MixingConfig
from beit_dist.images.decoding import patchify
from beit_dist.tasks.finetuning.mixing import Mixture, draw_mixture, mix_patches

SIDE, PATCH = 32, 8


def joined(parts: Iterator[Mixture]) -> tuple[Tensor, ...]:
    """Parts of a batch as a whole."""
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_restarts_change_no_mixture(ranks: int) -> None:
    config, whole = MixingConfig(), range(16)
    share = len(whole) // ranks
    parts = (draw_mixture(config, 3, 160, whole[rank * share : (rank + 1) * share], SIDE) for rank in range(ranks))
    for got, expected in zip(joined(parts), draw_mixture(config, 3, 160, whole, SIDE), strict=True):
        assert torch.equal(got, expected)
    # A batch of twice the size that begins earlier has the same rows in its second half.
    larger = draw_mixture(config, 3, 144, range(16, 32), SIDE)
    assert torch.equal(larger.shares, draw_mixture(config, 3, 160, whole, SIDE).shares)


def test_other_seeds_and_places_give_other_mixtures() -> None:
    shares = [
        draw_mixture(MixingConfig(), seed, first, range(32), SIDE).shares
        for seed, first in ((0, 0), (1, 0), (0, 32))
    ]
    assert not torch.equal(shares[0], shares[1])
    assert not torch.equal(shares[0], shares[2])


def test_both_of_a_pair_have_one_share_and_pairs_differ() -> None:
    mixture = draw_mixture(MixingConfig(), 0, 0, range(64), SIDE)
    assert torch.equal(mixture.shares[::2], mixture.shares[1::2])
    assert len(mixture.shares.unique()) > 20
    cut = (mixture.boxes[:, 2] - mixture.boxes[:, 0]) * (mixture.boxes[:, 3] - mixture.boxes[:, 1])
    assert 0 < (cut > 0).sum() < 64  # both kinds occur
    assert torch.allclose(mixture.shares[cut > 0], 1 - cut[cut > 0] / SIDE**2)
    assert torch.equal(mixture.shares[cut == 0], mixture.blends[cut == 0])


@pytest.mark.parametrize(
    "config",
    [MixingConfig(probability=0), MixingConfig(mixup=0, cutmix=0)],
    ids=["never", "neither"],
)
def test_nothing_is_mixed_where_nothing_is_asked_for(config: MixingConfig) -> None:
    assert not config.active
    mixture = draw_mixture(config, 0, 0, range(32), SIDE)
    assert (mixture.shares == 1).all()
    assert (mixture.boxes == 0).all()


def test_shares_follow_the_beta_distribution() -> None:
    shares = draw_mixture(MixingConfig(mixup=0.8, cutmix=0), 0, 0, range(20_000), SIDE).shares[::2].double()
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.03)  # of Beta(a, a)


def test_pixels_are_mixed_where_they_lie_in_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    patches = torch.stack([torch.from_numpy(patchify(image.numpy(), PATCH)) for image in images])
    box = (4, 9, 20, 31)
    mixture = Mixture(torch.tensor([1.0, 0.25]), torch.tensor([box, (0, 0, 0, 0)]), torch.tensor([0.0, 0.25]))
    mixed = mix_patches(patches, patches.flip(0), mixture, PATCH)

    pasted = images[0].clone()
    pasted[box[0] : box[2], box[1] : box[3]] = images[1, box[0] : box[2], box[1] : box[3]]
    assert torch.equal(mixed[0], torch.from_numpy(patchify(pasted.numpy(), PATCH)).float())
    blended = images[1].float() * 0.25 + images[0].float() * 0.75
    back = mixed[1].view(SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, 3).transpose(1, 2).reshape(SIDE, SIDE, 3)
    assert torch.equal(back, blended)
