"""Images with zeros in place of their data are rejected, and good ones that hold many zeros are not."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from beit_dist.data.images import decode
from beit_dist.data.rejection import ImageRejectedError

AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(width: int = 480, height: int = 360) -> Image.Image:
    """Structure at all scales, as photographs have it."""
    random, pixels = np.random.default_rng(0), np.full((height, width, 3), 128.0)
    for scale in (4, 12, 40, 120):
        small = Image.fromarray(random.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8))
        pixels += (np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) - 128.0) * scale / 150
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def on_white(side: int = 1200) -> Image.Image:
    """A product shot: where tables are optimised, its background is coded as zeros."""
    image = Image.new("RGB", (side, side), "white")
    image.paste(photo(), (side // 4, side // 4))
    return image


def with_zeros(raw: bytes, start: int, length: int) -> bytes:
    return raw[:start] + bytes(length) + raw[start + length :]


PHOTO, PRODUCT = photo(), on_white()
JPEGS: dict[str, dict[str, Any]] = {
    "plain": {"quality": 90},
    "coarse": {"quality": 40},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1, "quality": 90},
}
LENGTHS, PLACES = (512, 4096), (0.1, 0.5, 0.9)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_with_zeros_in_its_scan_is_rejected(mode: str, options: dict[str, Any], length: int) -> None:
    raw = encoded(PHOTO.convert(mode), "JPEG", **options)
    first = raw.index(b"\xff\xda") + 14
    for place in PLACES:
        damaged = with_zeros(raw, first + int(place * (len(raw) - first - length - 2)), length)
        with pytest.raises(ImageRejectedError, match=r"zero bytes|of no segment|two codes") as caught:
            decode(damaged)
        assert caught.value.kind == "damaged"


@pytest.mark.parametrize("options", [{"optimize": True, "quality": 50}, {"lossless": True, "method": 0}])
def test_zeros_that_flat_regions_would_explain_are_found_out(options: dict[str, Any]) -> None:
    """The tables of this file turn zeros into white, so that only what is left over tells."""
    raw = encoded(PRODUCT, "WEBP" if "lossless" in options else "JPEG", **options)
    assert bytes(65) in raw[1000:]
    decode(raw)
    with pytest.raises(ImageRejectedError, match=r"the picture is full|too little data|Error"):
        decode(with_zeros(raw, len(raw) // 2, 1024))


def test_a_scan_that_zeros_have_left_too_short_is_rejected() -> None:
    raw = encoded(PRODUCT, "JPEG", progressive=True)
    with pytest.raises(ImageRejectedError, match="too little data"):
        decode(with_zeros(raw, len(raw) * 2 // 5, 256))


def test_restart_markers_bound_the_zeros_of_a_flat_region() -> None:
    raw = encoded(PRODUCT, "JPEG", optimize=True, restart_marker_rows=1)
    with pytest.raises(ImageRejectedError, match="data that can hold 114 in a row"):
        decode(with_zeros(raw, len(raw) // 2, 1024))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("WEBP", {"quality": 80}, id="webp"),
        pytest.param("WEBP", {"lossless": True, "method": 1}, id="webp-lossless"),
        pytest.param("AVIF", {"speed": 10, "quality": 90}, id="avif", marks=AVIF),
        pytest.param("JPEG2000", {}, id="jpeg2000"),
        pytest.param("PNG", {}, id="png"),
        pytest.param("GIF", {}, id="gif"),
        *(
            pytest.param("TIFF", {"compression": name}, id=name)
            for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_other_formats_with_zeros_are_rejected(kind: str, options: dict[str, Any], at_end: bool) -> None:
    raw = encoded(PHOTO, kind, **options)
    decode(raw)
    with pytest.raises(ImageRejectedError):
        decode(with_zeros(raw, len(raw) - 4096 if at_end else len(raw) // 2, 4096))


def test_a_png_whose_checksum_is_wrong_is_rejected() -> None:
    raw = bytearray(encoded(PHOTO, "PNG"))
    raw[-13] ^= 1  # of the IDAT chunk, in front of IEND
    with pytest.raises(ImageRejectedError, match="crc32 of the IDAT chunk"):
        decode(bytes(raw))


def test_a_deflated_tiff_that_libtiff_takes_is_rejected_by_its_checksum() -> None:
    """libtiff reads no further than to the last pixel, and sometimes zeros make enough of them."""
    raw, reasons = encoded(PHOTO, "TIFF", compression="tiff_adobe_deflate"), []
    for eighth in range(1, 8):
        with pytest.raises(ImageRejectedError) as caught:
            decode(with_zeros(raw, len(raw) * eighth // 8, 256))
        reasons.append(str(caught.value))
    assert any("deflate stream at byte" in reason for reason in reasons)


GREY = Image.new("RGB", (900, 700), "#808182")
GOOD = [
    *(encoded(image, "JPEG", **options) for image in (GREY, PRODUCT) for options in JPEGS.values()),
    encoded(Image.new("L", (900, 700), 255), "JPEG", progressive=True, quality=95),
    encoded(Image.new("L", (900, 700), 128), "JPEG", optimize=True),  # no bit of which changes anything
    encoded(GREY, "WEBP"),
    encoded(PRODUCT, "WEBP", method=0, quality=100),
    encoded(PRODUCT, "WEBP", method=0, lossless=True),
    encoded(PRODUCT, "TIFF", compression="tiff_adobe_deflate"),
    encoded(PRODUCT, "JPEG2000", tile_size=(256, 256)),
    encoded(PHOTO, "JPEG", exif=b"Exif\0\0" + bytes(5000)),
    encoded(PHOTO, "JPEG", icc_profile=bytes(90_000)),
    encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO]),
    *(encoded(PHOTO, kind) + bytes(4096) for kind in ("JPEG", "PNG", "WEBP", "JPEG2000", "GIF")),
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("number", range(len(GOOD)))
def test_good_images_may_hold_many_zeros(number: int) -> None:
    """Flat regions, metadata, second pictures, and anything behind the end, as phones and disks write it."""
    assert decode(GOOD[number]).mode == "RGB"


@AVIF
def test_zeros_in_the_metadata_of_an_avif_are_no_damage() -> None:
    assert decode(encoded(PHOTO, "AVIF", speed=10, xmp=bytes(4096))).size == PHOTO.size
