"""The yardstick of tokenizing: BEiT's augmentation by Pillow alone, as one writes it and as ours was first."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageStat

from beit_dist.images.decoding import crop_box, flips, jitter_of

Pixels = NDArray[np.uint8]


def pillow_view(raw: bytes, sample_id: int) -> tuple[Pixels, Pixels]:
    """Patches uint8 (196, 768) and the tokenizer's view uint8 (112, 112, 3) of one image.

    With the box, the jitter and the flip of version 1, and the same bytes; without any check of the file.
    """
    with Image.open(io.BytesIO(raw)) as opened:
        image = opened.convert("RGB")
    key = (sample_id, 0)
    box, jitter = crop_box(image.width, image.height, 0, key), jitter_of(0, key)
    for name in jitter.order:
        if name == "brightness":
            image = ImageEnhance.Brightness(image).enhance(jitter.brightness)
        elif name == "saturation":
            image = ImageEnhance.Color(image).enhance(jitter.saturation)
        else:
            grey = int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5)
            image = image.crop(box)
            image = Image.blend(Image.new("RGB", image.size, (grey, grey, grey)), image, jitter.contrast)
    view, token_view = (
        np.asarray(image.resize((side, side), kind))
        for side, kind in ((224, Image.Resampling.BICUBIC), (112, Image.Resampling.LANCZOS))
    )
    if flips(0, key):
        view, token_view = view[:, ::-1], token_view[:, ::-1]
    tiles = view.reshape(14, 16, 14, 16, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(196, 768), np.ascontiguousarray(token_view)
