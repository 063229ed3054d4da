"""Training tokenizers in this process, as the only rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.tokenizers import Training, picture

from beit_dist.engine.distributed import Ranks, close_process_groups, init_process_groups


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images in two folders."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number in range(12):
        where = folder / "sub" if number % 2 else folder
        Image.fromarray(picture(number)).save(where / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="package")
def joined() -> Iterator[torch.device]:
    """The process groups of a rank that is alone, and its device."""
    import deepspeed

    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["DS_ACCELERATOR"] = "cpu"
    device = init_process_groups(Ranks(), timedelta(minutes=5))
    os.environ.clear()  # what it has set is not for the processes that tests start
    os.environ.update(before)
    yield device
    close_process_groups()
    deepspeed.comm.comm.cdb = None  # or it believes to be joined still


@pytest.fixture
def training(
    tmp_path: Path, images: Path, joined: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Training]:
    """``training("a", steps=9, ...)``: a tokenizer to be written to ``a.safetensors``."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    def make(name: str = "t", source: Path = images, **settings: Any) -> Training:
        return Training(tmp_path / f"{name}.safetensors", source, joined, settings)

    return make
