"""Pictures with structure at several scales, as photographs have it, and files of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def photo(width: int = 451, height: int = 338) -> Image.Image:
    """Seeded."""
    random, pixels = np.random.default_rng(0), np.full((height, width, 3), 128.0)
    for scale in (4, 12, 40):
        small = Image.fromarray(random.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8))
        pixels += (np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) - 128.0) * scale / 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    """A file; options are Pillow's."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()
