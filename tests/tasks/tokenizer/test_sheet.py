"""The picture of a tokenizer: drawn for any number and size of images, the same bytes every time."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.tokenizers import picture

from beit_dist.config.dvae import DVAEConfig
from beit_dist.models.dvae import DVAE
from beit_dist.models.verdict import Drawn, SingleColours
from beit_dist.tasks.tokenizer.quality import Quality
from beit_dist.tasks.tokenizer.sheet import draw_sheet

MODEL = DVAE(DVAEConfig(vocabulary=16, hidden=8, blocks_per_group=1, decoder_input=8), seed=0).requires_grad_(
    False
)


def sheet(count: int, side: int, used: int = 5) -> bytes:
    """Of so many images."""
    images = torch.from_numpy(np.stack([picture(number, side) for number in range(count)])).permute(0, 3, 1, 2)
    counts = torch.zeros(16, dtype=torch.int64)
    counts[:used] = torch.arange(used) + 1
    names = [f"folder/photograph {number} with quite a long name.jpg" for number in range(count)]
    drawn = Drawn(12.0, SingleColours(13.0, 14.0))
    return draw_sheet(MODEL, images.contiguous(), names, Quality(12.0, counts), drawn, step=1000)


@pytest.mark.parametrize(("count", "side"), [(1, 32), (9, 32), (30, 112), (3, 256)])
def test_it_is_drawn_for_any_images_and_fits_a_screen(count: int, side: int) -> None:
    drawn = Image.open(io.BytesIO(sheet(count, side)))
    assert drawn.width < 1400
    assert drawn.height < 1400
    assert sheet(count, side) == sheet(count, side)


def test_an_original_is_in_it_pixel_for_pixel() -> None:
    drawn = np.asarray(Image.open(io.BytesIO(sheet(2, 112))))
    windows = np.lib.stride_tricks.sliding_window_view(drawn[:, :, 0], (112, 112))
    assert (windows[:, ::1] == picture(1, 112)[:, :, 0]).all((2, 3)).any()
