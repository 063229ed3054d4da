"""The first weights of a tokenizer's training: random, or such that they make the tokens of k-means."""

from __future__ import annotations

from torch import Tensor

from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.models.dvae import DVAE, STRIDE
from beit_dist.models.dvae_start import start_from_clusters
from beit_dist.tasks.tokenizer.noise import weights_seed
from beit_dist.tasks.tokenizer.pictures import Pictures

_PATCHES, _PATCHES_OF_A_TOKEN = 1 << 15, 16
"""Patches that clusters are made from, at least: in all, and for each token."""


def random_model(config: TokenizerConfig) -> DVAE:
    """The network, initialised from the seed."""
    return DVAE(config.model, seed=weights_seed(config.seed))


def clustered_weights(config: TokenizerConfig, pictures: Pictures) -> dict[str, Tensor]:
    """What ``start: clusters`` puts in place of random weights, by name. Takes seconds; for one rank."""
    print(f"finding {config.model.vocabulary:,} clusters of patches to start from", flush=True)
    patches = max(_PATCHES, _PATCHES_OF_A_TOKEN * config.model.vocabulary)
    crops = pictures.first_crops(-(-patches // (config.image_size // STRIDE) ** 2))
    return start_from_clusters(random_model(config), crops, config.seed)
