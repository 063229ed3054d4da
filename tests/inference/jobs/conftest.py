"""Runs with small models: pre-trained, and fine-tuned for classes of images and of pixels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.mixed_images import Mixed, write_mixed

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training of two layers of width 16, stopped at step 6."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(ROOT / "tests/engine/old_runs/first", folder)
    return folder


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """39 readable images in three sources, and three that are broken."""
    return write_mixed(tmp_path_factory.mktemp("mixed") / "images")
