"""Training tokenizers in this process, as the only rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.tokenizers import Training, picture


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images in two folders."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number in range(12):
        where = folder / "sub" if number % 2 else folder
        Image.fromarray(picture(number)).save(where / f"{number:02d}.png")
    return folder


@pytest.fixture
def training(tmp_path: Path, images: Path, joined: torch.device) -> Callable[..., Training]:
    """``training("a", steps=9, ...)``: a tokenizer to be written to ``a.safetensors``."""

    def make(name: str = "t", source: Path = images, **settings: Any) -> Training:
        return Training(tmp_path / f"{name}.safetensors", source, joined, settings)

    return make
