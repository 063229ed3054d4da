"""What turns up among millions of files: decoded right, or rejected with the reason, in bounded memory."""

from __future__ import annotations

import io
import multiprocessing
import resource
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, PngImagePlugin

from beit_dist.images.decoding import FORMATS, decode
from beit_dist.images.rejection import ImageRejectedError

PHOTO = Image.fromarray(
    np.stack([np.linspace(0, 200, 96 * 64).reshape(64, 96), *np.mgrid[0:64, 0:96] * 2], axis=-1).astype(np.uint8)
)
BLACK_AND_WHITE = PHOTO.convert("1", dither=Image.Dither.NONE)
RED, BLUE = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def mean(image: Image.Image) -> list[float]:
    return [float(value) for value in np.asarray(image.convert("RGB")).mean(axis=(0, 1))]


def big_endian_grey16() -> bytes:
    return encoded(Image.frombytes("I;16B", (64, 64), np.linspace(0, 65535, 4096).astype(">u2").tobytes()), "TIFF")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param(encoded(PHOTO, "JPEG", progressive=True, quality=95), mean(PHOTO), id="progressive"),
        pytest.param(
            encoded(PHOTO, "MPO", save_all=True, append_images=[RED], quality=95), mean(PHOTO), id="mpo"
        ),  # as phones write
        pytest.param(
            encoded(PHOTO.convert("CMYK"), "JPEG", quality=95), mean(PHOTO), id="cmyk-adobe"
        ),  # inverted, with Adobe's marker
        pytest.param(
            encoded(PHOTO, "JPEG", quality=95, icc_profile=b"no profile at all"), mean(PHOTO), id="icc-broken"
        ),
        pytest.param(encoded(PHOTO, "PNG", dpi=(1, 1)), mean(PHOTO), id="png-dpi"),
        pytest.param(encoded(BLACK_AND_WHITE, "PNG"), mean(BLACK_AND_WHITE), id="1-bit"),
        pytest.param(encoded(PHOTO.convert("LA"), "PNG"), mean(PHOTO.convert("L")), id="LA"),
        pytest.param(encoded(PHOTO.quantize(256), "GIF"), mean(PHOTO.quantize(256)), id="palette"),
        pytest.param(big_endian_grey16(), [127.5] * 3, id="I;16B"),
        pytest.param(encoded(RED, "GIF", save_all=True, append_images=[BLUE]), [255, 0, 0], id="gif-frames"),
        pytest.param(
            encoded(RED, "WEBP", save_all=True, append_images=[BLUE], lossless=True), [255, 0, 0], id="webp-frames"
        ),
        pytest.param(encoded(RED, "PNG", save_all=True, append_images=[BLUE]), [255, 0, 0], id="apng"),
        pytest.param(encoded(RED, "TIFF", save_all=True, append_images=[BLUE]), [255, 0, 0], id="tiff-pages"),
        pytest.param(encoded(PHOTO, "JPEG2000"), mean(PHOTO), id="jpeg2000"),
    ],
)
def test_odd_but_whole_images_have_the_right_colours(raw: bytes, expected: list[float]) -> None:
    image = decode(raw)
    assert image.mode == "RGB"
    assert mean(image) == pytest.approx(expected, abs=1)


def with_text(add: Callable[[PngImagePlugin.PngInfo], None]) -> bytes:
    info = PngImagePlugin.PngInfo()
    add(info)
    return encoded(PHOTO, "PNG", pnginfo=info)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PROGRESSIVE = encoded(PHOTO, "JPEG", progressive=True)
PLAIN = encoded(PHOTO, "PNG")
PROFILE = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(99_000_000)))


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        pytest.param(b"", "not_an_image", "not an image", id="empty"),
        pytest.param(PROGRESSIVE[: len(PROGRESSIVE) // 2], "damaged", "truncated", id="progressive-cut"),
        pytest.param(PROGRESSIVE[:20], "not_an_image|damaged", ".", id="head-only"),
        pytest.param(encoded(PHOTO, "WEBP")[:-100], "damaged|not_an_image", ".", id="webp-cut"),
        pytest.param(encoded(PHOTO.convert("F"), "TIFF"), "value_range", "floating-point", id="float"),
        pytest.param(
            with_text(lambda info: info.add_text("t", "A" * 99_000_000, zip=True)),
            "damaged",
            "too large",
            id="text-bomb",
        ),
        pytest.param(
            with_text(lambda info: info.add_itxt("t", "A" * 99_000_000, zip=True)),
            "damaged",
            "too large",
            id="itext-bomb",
        ),
        pytest.param(PLAIN[:33] + PROFILE + PLAIN[33:], "damaged", "too large", id="icc-bomb"),
        pytest.param(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
            "not_an_image",
            "not an image",
            id="eps",
        ),
        pytest.param(encoded(PHOTO, "TGA"), "not_an_image", "not an image", id="tga"),
        pytest.param(encoded(Image.new("RGB", (1, 1)), "PNG"), "too_small", "1×1 px", id="1-pixel"),
    ],
)
def test_what_cannot_be_used_is_rejected_with_its_class_and_reason(raw: bytes, kind: str, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason) as caught:
        decode(raw)
    assert caught.value.kind in kind.split("|")


def test_formats_that_start_programs_are_not_read() -> None:
    """Pillow has Ghostscript draw EPS."""
    assert "EPS" not in FORMATS


def bombs() -> dict[str, bytes]:
    """Files of a few bytes that claim to be gigapixels."""
    tiny = Image.new("RGB", (16, 16))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    jpeg = bytearray(encoded(tiny, "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 50_000, 50_000)
    webp = bytearray(encoded(tiny, "WEBP", lossless=True))
    start = webp.index(b"VP8L") + 9
    webp[start : start + 4] = struct.pack("<I", 16_382 | 16_382 << 14)
    bmp = bytearray(encoded(tiny, "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    gif = bytearray(encoded(tiny, "GIF"))
    gif[6:10] = struct.pack("<HH", 50_000, 50_000)
    tiff = encoded(tiny, "TIFF").replace(
        struct.pack("<HHIHH", 256, 4, 1, 16, 0), struct.pack("<HHII", 256, 4, 1, 50_000)
    )
    return {
        "tiles": tiled_tiff(16, 50_000),
        "png": png + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""),
        "jpeg": bytes(jpeg),
        "webp": bytes(webp),
        "bmp": bytes(bmp),
        "gif": bytes(gif),
        "tiff": tiff.replace(struct.pack("<HHIHH", 257, 4, 1, 16, 0), struct.pack("<HHII", 257, 4, 1, 50_000)),
        "ppm": b"P6 50000 50000 255\n" + bytes(1000),
    }  # fmt: skip


def tiled_tiff(side: int, tile: int) -> bytes:
    """A grey TIFF of one tile, compressed by deflate."""
    packed = zlib.compress(bytes(1000))
    sizes = {256: side, 257: side, 322: tile, 323: tile, 324: 8, 325: len(packed)}
    tags = {258: 8, 259: 8, 262: 1, 277: 1} | sizes
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    start = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    return start + packed + struct.pack("<H", len(tags)) + directory + bytes(4)


def decode_in_little_memory(results: Any) -> None:
    """With 200 MB to allocate: a fifth of what a square of 20,000 pixels takes."""
    held = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (held + (200 << 20), resource.RLIM_INFINITY))
    found = {}
    for name, raw in bombs().items():
        try:
            decode(raw)
        except ImageRejectedError as error:
            found[name] = f"{error.kind}: {error}"
        except BaseException as error:
            found[name] = repr(error)
    results.put(found)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_anything_is_allocated() -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=decode_in_little_memory, args=(results,))
    child.start()
    found = results.get(timeout=60)
    child.join()
    assert len(found) == 8
    assert all(reason.startswith("too_large: ") for reason in found.values()), found
