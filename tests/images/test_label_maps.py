"""Label maps among the images are rejected by name, and dark pictures and drawings are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from beit_dist.images.decoding import decode
from beit_dist.images.rejection import ImageRejectedError

CLASSES = np.kron(np.arange(12).reshape(3, 4), np.ones((16, 16))).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 64, CLASSES.shape).astype(np.uint8)


def file_of(values: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("void", [0, 255])
def test_a_label_map_is_rejected_with_the_way_out(void: int) -> None:
    with pytest.raises(ImageRejectedError, match=r"values up to 10: a label map.*in another folder") as caught:
        decode(file_of(np.where(CLASSES == 11, np.uint8(void), CLASSES)))
    assert caught.value.kind == "value_range"


@pytest.mark.parametrize(
    "values",
    [NOISE, np.where(CLASSES % 2, np.uint8(255), np.uint8(0)), np.zeros_like(CLASSES), CLASSES * 10],
    ids=["dark photograph", "drawing", "black", "bright"],
)
def test_what_is_dark_or_flat_alone_is_kept(values: NDArray[np.uint8]) -> None:
    assert np.array_equal(np.asarray(decode(file_of(values)))[..., 0], values)


def test_a_jpeg_is_no_label_map() -> None:
    decode(file_of(CLASSES, "JPEG"))
