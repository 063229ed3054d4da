"""Decoding takes what the world calls an image, augmentation is keyed, and patches keep their order."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from beit_dist.images import decoding as images
from beit_dist.images.decoding import CROP_RATIO, Pixels, View, crop_box, decode, make_view, patchify, unpatchify
from beit_dist.images.rejection import ImageRejectedError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height: int = 40, width: int = 60) -> Image.Image:
    """Smooth and without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (height + width)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def view_of(image: Image.Image, sample_id: int = 0, view: int = 0, seed: int = 0, augment: Any = "random") -> View:
    return make_view(
        image, image_size=32, token_size=16, augment=augment, seed=seed, sample_id=sample_id, view=view
    )


def test_rgb_comes_back_as_it_is() -> None:
    pixels = noise(20, 30)
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(pixels)))), pixels)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "PA"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    rgb = decode(
        encoded(
            picture().convert("L" if mode in ("LA", "PA") else "RGB").convert(mode),
            "TIFF" if mode == "PA" else "PNG",
        )
    )
    assert (rgb.mode, rgb.size) == ("RGB", (60, 40))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("TIFF", "CMYK"),
        ("TIFF", "YCbCr"),
        ("WEBP", "RGBA"),
        ("BMP", "RGB"),
        ("PPM", "RGB"),
    ],
)
def test_other_formats_and_colour_spaces_are_read(kind: str, mode: str) -> None:
    rgb = decode(encoded(picture().convert(mode), kind))
    assert (rgb.mode, rgb.size) == ("RGB", (60, 40))


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    rgb = np.asarray(decode(encoded(Image.fromarray(values))))
    assert np.array_equal(rgb[..., 0], np.round(values / 257).astype(np.uint8))
    with pytest.raises(ImageRejectedError, match="which value is white"):
        decode(encoded(Image.fromarray(values.astype(np.int32) * 2), "TIFF"))
    with pytest.raises(ImageRejectedError, match="floating-point"):
        decode(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


def test_transparent_pixels_show_white() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8, :, 3] = 255
    rgb = np.asarray(decode(encoded(Image.fromarray(pixels))))
    assert (rgb[:8] == 0).all()
    assert (rgb[8:] == 255).all()
    palette = Image.fromarray(noise(16, 16)).quantize(8)
    assert decode(encoded(palette, transparency=0)).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = picture(24, 40)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of what a viewer does, in Pillow's numbers
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(encoded(stored, exif=exif))), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_picture() -> None:
    raw = encoded(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff broken")
    assert decode(raw).size == (60, 40)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(raw))[0, 0].tolist() == [255, 0, 0]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that only claims to be so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not an image"),
        (b"no image at all", "not an image"),
        (encoded(picture(), "JPEG")[:-200], "truncated"),
        (encoded(picture())[:-100], "OSError|SyntaxError|truncated|broken"),
        (encoded(Image.new("RGB", (1, 1))), "1×1 px"),
        (encoded(Image.new("RGB", (500, 7))), "shorter than 8 px"),
        (png_of_size(10_000, 10_000), "more than 89,478,485 pixels"),
        (png_of_size(100_000, 100_000), "more than 89,478,485 pixels"),
        (b"GIF89a" + bytes(20), "not an image|Error"),
    ],
)
def test_unusable_images_give_a_reason_that_is_the_same_every_time(raw: bytes, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason) as first:
        decode(raw)
    with pytest.raises(ImageRejectedError) as second:
        decode(bytearray(raw) if raw else raw)  # type: ignore[arg-type]
    assert str(first.value) == str(second.value)
    assert "0x" not in str(first.value)


def test_a_view_is_a_function_of_seed_id_and_view_alone() -> None:
    image = picture()
    one = view_of(image, 5, 1, 9)
    view_of(image, 6, 0, 9)
    again = view_of(image, 5, 1, 9)
    assert (one.box, one.flip) == (again.box, again.flip)
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.token_image, again.token_image)
    for other in (view_of(image, 6, 1, 9), view_of(image, 5, 2, 9), view_of(image, 5, 1, 8)):
        assert other.box != one.box


def test_the_draws_never_change() -> None:
    """Pinned: a data set that is extended or repaired by a later release must fit to the rest of it."""
    assert [crop_box(500, 375, 3, (sample_id, 0)) for sample_id in range(3)] == PINNED_BOXES
    assert "".join("01"[images.flips(3, (sample_id, 0))] for sample_id in range(16)) == PINNED_FLIPS


PINNED_BOXES = [(42, 1, 436, 375), (137, 63, 447, 318), (113, 51, 461, 365)]
PINNED_FLIPS = "0100001100011011"


def test_crops_have_torchvisions_distribution() -> None:
    boxes = np.array([crop_box(500, 375, 0, (sample_id, 0)) for sample_id in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 500).all()
    assert (boxes[:, 3] <= 375).all()
    area, ratio = width * height / (500 * 375), width / height
    assert 0.079 < area.min() < 0.09
    assert 0.9 < area.max() <= 1
    assert ratio.min() > CROP_RATIO[0] * 0.98
    assert ratio.max() < CROP_RATIO[1] * 1.02
    assert abs(area.mean() - EXPECTED_AREA) < 0.015
    assert abs(np.log(ratio).mean() - EXPECTED_LOG_RATIO) < 0.01
    left = boxes[:, 0] / np.maximum(1, 500 - width)
    assert abs(left.mean() - 0.5) < 0.02


# From 200,000 draws of torchvision's algorithm with Python's generator, for a 500×375 image.
EXPECTED_AREA, EXPECTED_LOG_RATIO = 0.433, 0.031


def test_views_take_no_less_of_the_area_than_they_are_told_to() -> None:
    image = Image.new("RGB", (500, 375))
    sizes = {"image_size": 16, "token_size": 16, "augment": "random", "seed": 0, "view": 0}
    boxes = np.array([make_view(image, sample_id=n, crop_area=0.5, **sizes).box for n in range(300)])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (500 * 375)
    assert 0.49 < area.min() < 0.53
    assert area.max() > 0.9


def test_flips_are_even_and_independent_of_crops() -> None:
    flips = np.array([images.flips(0, (sample_id, 0)) for sample_id in range(4000)])
    assert abs(flips.mean() - 0.5) < 0.03
    lefts = np.array([crop_box(500, 500, 0, (sample_id, 0))[0] for sample_id in range(4000)])
    assert abs(np.corrcoef(flips, lefts)[0, 1]) < 0.05


@pytest.mark.parametrize(("width", "height"), [(1000, 8), (8, 1000), (8, 8), (9, 2000)])
def test_extreme_shapes_fall_back_to_a_centred_box_inside_the_image(width: int, height: int) -> None:
    for sample_id in range(50):
        left, top, right, bottom = crop_box(width, height, 0, (sample_id, 0))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    left, top, right, bottom = crop_box(1000, 8, 0, (0, 0))
    assert (right - left, bottom - top) == (11, 8)
    assert abs((left + right) / 2 - 500) <= 1


def test_both_sizes_show_the_same_crop() -> None:
    """The token image, enlarged, is close to the backbone's image: same box, flip and jitter."""
    for sample_id in range(8):
        view = view_of(picture(80, 120), sample_id)
        enlarged = np.asarray(Image.fromarray(view.token_image).resize((32, 32), Image.Resampling.BICUBIC))
        assert np.abs(enlarged.astype(int) - view.image).mean() < 3


def test_the_flip_mirrors_the_crop() -> None:
    image = picture()
    flipped = next(i for i in range(50) if view_of(image, i).flip)
    view = view_of(image, flipped)
    assert view.image[:, 0, 0].mean() > view.image[:, -1, 0].mean()  # red grows to the right in the source


def test_jitter_on_the_crop_equals_jitter_on_the_whole_image() -> None:
    image = Image.fromarray(noise(50, 70))
    box = (10, 5, 40, 45)
    for sample_id in range(24):
        key = (sample_id, 0)
        raw = images.words(0, images.Purpose.JITTER, key, 6)
        factors = [0.6 + 0.8 * float(u) for u in images.uniforms(raw[:3])]
        whole = image
        for operation in np.argsort(raw[3:], kind="stable"):
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
            whole = enhance(whole).enhance(factors[operation])
        assert np.array_equal(np.asarray(images._jittered_crop(image, box, 0, key)), np.asarray(whole.crop(box)))


def test_center_is_the_centred_square_and_nothing_else() -> None:
    image = picture(40, 60)
    view = view_of(image, sample_id=3, view=0, augment="center")
    assert (view.box, view.flip) == ((10, 0, 50, 40), False)
    expected = np.asarray(image.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(view.image, expected)
    assert np.array_equal(view.image, view_of(image, sample_id=4, seed=1, augment="center").image)


def test_patches_are_row_major_and_pixels_y_x_channel() -> None:
    image = noise(24, 24)
    patches = patchify(image, 8)
    assert patches.shape == (9, 192)
    assert patches.flags.c_contiguous
    for row in range(3):
        for column in range(3):
            block = image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert np.array_equal(patches[3 * row + column], block.reshape(-1))
    assert np.array_equal(unpatchify(patches, 8), image)


def test_a_jittered_image_keeps_its_mean_in_the_range_of_the_factors() -> None:
    grey = Image.new("RGB", (40, 40), (100, 100, 100))
    means = [view_of(grey, sample_id).image.mean() for sample_id in range(200)]
    assert math.isclose(min(means), 60, abs_tol=2)
    assert math.isclose(max(means), 140, abs_tol=2)
