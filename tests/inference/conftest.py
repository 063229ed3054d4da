"""Tiny runs of every kind, finished once for all tests of loaded models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import finished_runs

from beit_dist.shards.manifest import Manifest


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs and of their data."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def pretrained(runs: Path, make_shards: Callable[..., Manifest]) -> Path:
    """A pre-training run of 3 blocks on images of 32 px."""
    return finished_runs.pretrained(runs, make_shards)


@pytest.fixture(scope="session")
def classes(runs: Path, pretrained: Path) -> Path:
    """A classification run that started from it, with averaged weights."""
    return finished_runs.classifier(runs, pretrained)


@pytest.fixture(scope="session")
def segments(runs: Path, pretrained: Path) -> Path:
    """A segmentation run that started from it."""
    return finished_runs.segmenter(runs, pretrained)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five PNGs of noise in several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(40, 40), (70, 41), (33, 90), (32, 32), (128, 64)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.iterdir())
