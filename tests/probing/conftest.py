"""A small backbone and images of three classes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.classes import write_classes

from beit_dist.config.model import ModelConfig
from beit_dist.models.mim import MaskedImageModel


@pytest.fixture(scope="session")
def model() -> MaskedImageModel:
    config = ModelConfig(width=16, depth=3, heads=2, image_size=16, patch_size=4, vocabulary=16)
    made = MaskedImageModel(config)
    made.initialise(1)
    return made


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images."""
    return write_classes(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 others."""
    return write_classes(tmp_path_factory.mktemp("test"), (4, 3, 2), seed=1)
