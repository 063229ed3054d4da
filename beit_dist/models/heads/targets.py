"""What a model can learn to predict, by the name that a recipe calls it: ``model.target``."""

from __future__ import annotations

from beit_dist.config.model import ModelConfig
from beit_dist.config.reading import entry_of
from beit_dist.models.heads.base import Head
from beit_dist.models.heads.pixels import PixelsHead
from beit_dist.models.heads.tokens import TokensHead

HEADS: dict[str, type[Head]] = {"tokens": TokensHead, "pixels": PixelsHead}


def head_of(config: ModelConfig) -> type[Head]:
    """The head of a recipe.

    Raises:
        ConfigError: there is no such target.
    """
    return entry_of("model.target", config.target, HEADS)
