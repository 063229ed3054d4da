"""simplejpeg in Pillow's place, and JPEGs shrunk in decoding: the same pixels, and damage is found alike."""

from __future__ import annotations

import builtins
import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.photographs import jpeg, photo

from beit_dist.errors import ConfigError
from beit_dist.images.decoding import decode, decode_picture
from beit_dist.images.jpeg_decoders import SCALES, Decoder, decoder_version
from beit_dist.images.rejection import ImageRejectedError

try:
    import simplejpeg  # noqa: F401
except ImportError:
    _HAVE = False
else:
    _HAVE = True
DECODERS = [
    "pillow",
    pytest.param("simplejpeg", marks=pytest.mark.skipif(not _HAVE, reason="pip install simplejpeg")),
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"quality": 90},
    "444": {"quality": 90, "subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "rgb": {"keep_rgb": True},
}


def shrunk(raw: bytes, scale: int, decoder: Decoder) -> np.ndarray[Any, Any]:
    return decode_picture(raw, lambda width, height: scale, decoder).pixels


@pytest.mark.skipif(not _HAVE, reason="pip install simplejpeg")
@pytest.mark.parametrize("scale", [1, *SCALES])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_simplejpeg_gives_the_pixels_of_pillow(
    options: dict[str, Any], scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, calls = jpeg(photo(), **options), 0
    module, honest = importlib.import_module("simplejpeg"), importlib.import_module("simplejpeg").decode_jpeg

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return honest(*arguments, **named)

    monkeypatch.setattr(module, "decode_jpeg", counted)
    assert np.array_equal(shrunk(raw, scale, "simplejpeg"), shrunk(raw, scale, "pillow"))
    assert calls == 1


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_spaces_are_decoded_by_pillow(mode: str, decoder: Decoder) -> None:
    raw = jpeg(photo().convert(mode))
    assert np.array_equal(np.asarray(decode(raw, decoder)), np.asarray(decode(raw)))
    assert shrunk(raw, 2, decoder).shape == (169, 226, 3)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_shrunk_picture_is_upright_and_knows_its_size(orientation: int, decoder: Decoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw, asked = jpeg(photo(), exif=exif), list[tuple[int, int]]()

    def scale_of(width: int, height: int) -> int:
        asked.append((width, height))
        return 2

    picture, whole = decode_picture(raw, scale_of, decoder), decode(raw)
    assert asked == [whole.size] == [(picture.width, picture.height)]
    half = np.asarray(whole.resize(picture.image.size, Image.Resampling.BOX)).astype(int)
    assert picture.image.size == tuple(-(-side // 2) for side in whole.size)
    assert np.abs(half - picture.pixels).mean() < 4


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("scale", [1, *SCALES])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_damage_is_found_by_every_decoder_at_every_scale(
    options: dict[str, Any], scale: int, decoder: Decoder
) -> None:
    raw = jpeg(photo(960, 720), **options)
    shrunk(raw, scale, decoder)
    first = raw.index(b"\xff\xda") + 14
    for place in (0.1, 0.5, 0.9):
        at = first + int(place * (len(raw) - first - 4098))
        damaged = {
            "cut short": raw[:at],
            "closed with an end marker": raw[:at] + b"\xff\xd9",
            "a page is lost": raw[:at] + raw[at + 4096 :],
            "a page of zeros": raw[:at] + bytes(4096) + raw[at + 4096 :],
        }
        for what, file in damaged.items():
            with pytest.raises(ImageRejectedError) as caught:
                shrunk(file, scale, decoder)
            assert caught.value.kind == "damaged", what


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "JPEG", "progressive": True}])
def test_only_jpegs_of_one_scan_are_shrunk(options: dict[str, Any]) -> None:
    stream = io.BytesIO()
    photo().save(stream, **options)
    picture = decode_picture(stream.getvalue(), lambda width, height: 2)
    assert picture.image.size == (451, 338) == (picture.width, picture.height)
    assert picture.scale == 1


def test_a_decoder_that_is_not_installed_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Callable[..., Any] = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name == "simplejpeg":
            raise ModuleNotFoundError(name)
        return honest(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert decoder_version("pillow") == "pillow"
    with pytest.raises(ConfigError, match=r"--decoder: got 'simplejpeg'.*pip install simplejpeg"):
        decoder_version("simplejpeg")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("scale", [1, *SCALES])
def test_a_restart_interval_that_ends_early_is_found_at_every_scale(scale: int, decoder: Decoder) -> None:
    raw = jpeg(photo(960, 720), restart_marker_rows=1, subsampling=0)
    third, fourth = raw.index(b"\xff\xd2"), raw.index(b"\xff\xd3")
    shrunk(raw, scale, decoder)
    with pytest.raises(ImageRejectedError, match="too little data"):
        shrunk(raw[: third + (fourth - third) // 3] + raw[fourth:], scale, decoder)
