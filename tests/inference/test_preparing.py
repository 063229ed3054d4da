"""Odd images arrive as a run sees them, and what is none is refused by name, never by an error of torch."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit_dist.config.model import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from beit_dist.errors import ConfigError, DataError, UserError
from beit_dist.images.decoding import decode
from beit_dist.inference.inputs import normalised, patches_of
from beit_dist.inference.preparing import Preparation

CONFIG = BackboneConfig(width=16, depth=1, heads=2, image_size=32, patch_size=8)
PREPARE = Preparation(CONFIG)
CPU = torch.device("cpu")


def odd(folder: Path) -> list[Path]:
    """One picture in many modes and formats."""
    random = np.random.default_rng(0)
    colours = Image.fromarray(random.integers(0, 256, (50, 40, 3), dtype=np.uint8))
    alpha = colours.copy()
    alpha.putalpha(Image.fromarray(random.integers(0, 256, (50, 40), dtype=np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(random.integers(0, 65536, (50, 40)).astype(np.uint16))
    colours.save(folder / "turned.jpg", exif=exif)
    colours.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.gif")
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    for name, image in {
        "alpha": alpha,
        "grey alpha": alpha.convert("LA"),
        "grey": colours.convert("L"),
        "bits": colours.convert("1"),
        "palette": alpha.convert("P"),
        "sixteen": wide,
    }.items():
        image.save(folder / f"{name}.png")
    wide.save(folder / "sixteen.tif")
    return sorted(folder.iterdir())


def test_odd_images_of_pillow_are_those_of_their_files(tmp_path: Path) -> None:
    for file in odd(tmp_path):
        expected = np.asarray(decode(file.read_bytes()))
        for form in (file, str(file), file.read_bytes(), Image.open(file)):
            whole = PREPARE.whole(form)
            assert np.array_equal(whole, expected), (file.name, type(form))
            assert np.array_equal(PREPARE(form), PREPARE(whole)), file.name
        assert PREPARE(file).shape == (32, 32, 3)
        assert PREPARE(file).flags.writeable
    assert PREPARE.whole(tmp_path / "turned.jpg").shape == (40, 50, 3)


def test_arrays_of_other_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    assert np.array_equal(PREPARE.whole(pixels[..., 0])[..., 2], pixels[..., 0])
    clear = pixels.copy()
    clear[..., 3] = 0
    assert (PREPARE.whole(clear) == 255).all()
    assert np.array_equal(PREPARE.whole(pixels[:, ::-1, :3]), pixels[:, ::-1, :3])


def test_open_files_and_columns_of_tables(photos: list[Path]) -> None:
    expected = patches_of(photos[:2], PREPARE, CPU)
    with photos[0].open("rb") as one:
        assert torch.equal(patches_of([one, io.BytesIO(photos[1].read_bytes())], PREPARE, CPU), expected)
    for column in (np.array(photos[:2]), np.array([str(photo) for photo in photos[:2]])):
        assert torch.equal(patches_of(column, PREPARE, CPU), expected)
    tensors = [torch.from_numpy(PREPARE(photo)) for photo in photos[:2]]
    assert torch.equal(patches_of(iter(tensors), PREPARE, CPU), expected)


def test_pixels_of_0_to_1_that_nobody_normalised_are_told_of() -> None:
    images = torch.rand(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="values from .* look as if they were not normalised"):
        patches_of(images, PREPARE, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patches_of(2 * images - 1, PREPARE, CPU)


def test_images_are_prepared_in_threads_and_in_processes_without_torch(photos: list[Path]) -> None:
    expected = [PREPARE(photo) for photo in photos]
    with ThreadPoolExecutor(4) as threads:
        for one, other in zip(threads.map(PREPARE, photos * 4), expected * 4, strict=True):
            assert np.array_equal(one, other)
    script = (
        "import pickle, sys; prepare = pickle.loads(sys.stdin.buffer.read()); pixels = prepare(sys.argv[1]); "
        "assert 'torch' not in sys.modules; sys.stdout.buffer.write(pixels.tobytes())"
    )
    command = [sys.executable, "-c", script, str(photos[0])]
    made = subprocess.run(command, input=pickle.dumps(PREPARE), capture_output=True, timeout=300)
    assert made.returncode == 0, made.stderr.decode()
    assert made.stdout == expected[0].tobytes()


def test_normalised_pixels_go_in_as_they_are() -> None:
    config = CONFIG.model_copy(update={"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD})
    prepare, images = Preparation(config), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    exact = patches_of(images, prepare, CPU)
    again = patches_of(normalised(images, config), prepare, CPU)
    assert exact.dtype == torch.uint8
    assert torch.allclose(again, exact.float(), atol=1e-3)
    assert torch.equal(exact, patches_of(images.permute(0, 2, 3, 1), prepare, CPU))


BAD_TENSORS: list[tuple[Any, str]] = [
    (torch.rand(2, 3, 32, 30), "expected normalised pixels (3, 32, 32) or (B, 3, 32, 32). Resize them"),
    (torch.rand(2, 3, 48, 48), "Load the model with image_size=48"),
    (torch.rand(2, 1, 32, 32), "got 'a tensor (2, 1, 32, 32) of float32', expected normalised pixels"),
    (torch.rand(2, 32, 32, 3), "expected normalised pixels"),
    (torch.rand(32), "expected normalised pixels"),
    (torch.rand(1, 2, 3, 32, 32), "expected normalised pixels"),
    (torch.rand(0, 3, 32, 32), "expected at least one image"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "uint8 pixels from 0 to 255, or floating-point ones"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.bool), "of bool', expected uint8 pixels"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.complex64), "of complex64', expected uint8"),
    (torch.zeros(2, 40, 40, 3, dtype=torch.uint8), "image_size=40"),
    (torch.full((1, 3, 32, 32), 255.0), "floating-point values from 255 to 255', expected normalised pixels"),
    (torch.full((1, 3, 32, 32), float("nan")), "floating-point values from nan"),
    (torch.full((1, 3, 32, 32), float("inf"), dtype=torch.bfloat16), "values from inf"),
    ([torch.rand(3, 32, 32), torch.rand(3, 16, 16)], "tensors of one size in a list"),
    ([torch.rand(3, 32, 32), "photo.png"], "tensors of one size in a list"),
    ([], "got [], expected at least one"),
    ((torch.rand(3, size, size) for size in (32, 16)), "tensors of one size in a list"),
    ({"photo.png": 1}, "got 'dict', expected images of Pillow"),
    (io.StringIO("no image"), "got 'StringIO', expected images of Pillow"),
    (io.BytesIO(b"no image"), "not an image that Pillow reads"),
    (None, "got 'NoneType', expected images of Pillow"),
    (7, "got 'int', expected images of Pillow"),
    ([None], "got 'NoneType', expected images of Pillow"),
    (np.zeros((32, 32, 3), np.float32), "an array (32, 32, 3) of float32', expected uint8 arrays"),
    (np.zeros((3, 32, 32), np.uint8), "an array (3, 32, 32) of uint8', expected uint8 arrays"),
    (np.zeros((3, 32, 32), np.uint8), "array.transpose(1, 2, 0)"),
    (np.zeros((0, 32, 3), np.uint8), "expected one with pixels"),
    (np.zeros((2, 2, 3), np.uint8), "a side shorter than 8 px"),
    (Image.new("F", (32, 32)), "floating-point pixels, whose range is not known"),
    (b"no image", "not an image that Pillow reads"),
    ("missing.png", "missing.png: cannot be read (No such file or directory)"),
    ("photos/*.png", "Patterns are not expanded here"),
    (".", ".: is a folder, expected an image. Name the images in it"),
    ("", "an empty path: is a folder"),
    ("s3:/photo.png", "s3:// with two slashes"),
]


@pytest.mark.parametrize(("images", "said"), BAD_TENSORS, ids=[said[:40] for _, said in BAD_TENSORS])
def test_what_is_no_image_is_refused_with_what_was_got_and_expected(images: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        patches_of(images, PREPARE, CPU)
    assert said in str(raised.value)


def test_a_damaged_file_is_named(tmp_path: Path, photos: list[Path]) -> None:
    (tmp_path / "half.png").write_bytes(photos[0].read_bytes()[:2000])
    with pytest.raises(DataError, match=r"half\.png: .*Mend or leave it out"):
        PREPARE(tmp_path / "half.png")
    with pytest.raises(DataError, match=r"half\.png: "):
        PREPARE(Image.open(tmp_path / "half.png"))
    with pytest.raises(ConfigError, match=r"pixels: got 'torch\.float32', expected a uint8 tensor"):
        normalised(torch.zeros(3, 32, 32), CONFIG)
