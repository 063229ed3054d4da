"""Images of more than 8 bits a sample come out as the file says, or are rejected where it says too little."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from beit_dist.images.decoding import decode
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.images.to_rgb import Samples, samples, to_rgb

WIDTH, HEIGHT = 64, 16
RAMP = np.tile(np.arange(WIDTH, dtype=np.uint16) * 1000, (HEIGHT, 1))
"""Grey of 16 bits, brighter to the right."""
RAMP_12 = (RAMP >> 4).astype(np.uint16)
COLOURS = np.stack([RAMP, RAMP[:, ::-1], RAMP // 2], axis=-1)
EXPECTED = np.round(RAMP / 257)


def tiff(data: bytes, bits: int, photometric: int, samples: int = 1, **tags: int) -> bytes:
    """A little-endian TIFF of one strip, or of one for each plane; further tags as ``t341=4095``."""
    strips = samples if tags.get("t284") == 2 else 1
    size = len(data) // strips
    fields: dict[int, list[int]] = {
        256: [WIDTH],
        257: [HEIGHT],
        258: [bits] * samples,
        259: [1],
        262: [photometric],
    }
    fields |= {273: [8 + size * i for i in range(strips)], 277: [samples], 278: [HEIGHT], 279: [size] * strips}
    fields |= {int(name[1:]): [value] for name, value in tags.items()}
    body, entries = data, b""
    for tag, values in sorted(fields.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(packed) > 4:
            packed, body = struct.pack("<I", 8 + len(body)), body + packed
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(fields)) + entries + bytes(4)
    )


def png(pixels: NDArray[np.integer[Any]], colour: int, *more: tuple[bytes, bytes]) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.reshape(HEIGHT, -1))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour, 0, 0, 0)
    chunks: Iterable[tuple[bytes, bytes]] = (
        (b"IHDR", header),
        *more,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def pgm(values: NDArray[np.uint16], white: int) -> bytes:
    return b"P5 %d %d %d\n" % (WIDTH, HEIGHT, white) + values.astype(">u2").tobytes()


def jpeg2000(values: NDArray[np.uint16]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG2000", no_jp2=True)
    return stream.getvalue()


def in_12_bits() -> bytes:
    pairs = RAMP_12.reshape(-1, 2).astype(int)
    return np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1).astype(
        np.uint8
    ).tobytes()  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param(tiff(RAMP.tobytes(), 16, 0), 255 - EXPECTED, id="white-is-zero-16"),
        pytest.param(tiff((RAMP >> 8).astype(np.uint8).tobytes(), 8, 0), 255 - EXPECTED, id="white-is-zero-8"),
        pytest.param(tiff(in_12_bits(), 12, 1), EXPECTED, id="12-bits-a-sample"),
        pytest.param(tiff(RAMP_12.tobytes(), 16, 1, t341=4095), EXPECTED, id="12-bits-by-tag"),
        pytest.param(tiff(RAMP_12.tobytes(), 16, 0, t281=4095), 255 - EXPECTED, id="12-bits-by-tag-white-is-zero"),
        pytest.param(tiff(RAMP.tobytes(), 16, 1, t341=64000), EXPECTED, id="brightest-pixel-is-not-white"),
        pytest.param(tiff(RAMP.astype("<u4").tobytes(), 32, 1, t341=65535), EXPECTED, id="32-bits-by-tag"),
        pytest.param(pgm(RAMP, 65535), EXPECTED, id="pgm-16"),
        pytest.param(pgm(RAMP_12, 4095), EXPECTED, id="pgm-12"),
        pytest.param(jpeg2000(RAMP), EXPECTED, id="jpeg-2000"),
        pytest.param(png(RAMP_12 << 4, 0, (b"sBIT", b"\x0c")), EXPECTED, id="png-sbit"),
    ],
)
def test_grey_of_many_bits_comes_out_as_the_file_says(raw: bytes, expected: NDArray[np.float64]) -> None:
    pixels = np.asarray(decode(raw)).astype(int)
    assert np.abs(pixels - expected[..., None]).max() <= 1


def test_transparency_of_16_bit_grey_shows_white() -> None:
    pixels = np.asarray(decode(png(RAMP, 0, (b"tRNS", struct.pack(">H", 3000)))))
    assert (pixels[:, 3] == 255).all()
    assert np.array_equal(np.delete(pixels[..., 0], 3, axis=1), np.delete(EXPECTED, 3, axis=1))


def test_transparency_of_16_bit_colour_compares_all_16_bits() -> None:
    colours = COLOURS.copy()
    colours[:, 5], colours[:, 6] = (300, 7, 9), (301, 7, 9)
    pixels = np.asarray(decode(png(colours, 2, (b"tRNS", struct.pack(">HHH", 300, 7, 9)))))
    assert (pixels[:, 5] == 255).all()
    assert pixels[0, 6].tolist() == [1, 0, 0]
    assert np.array_equal(np.delete(pixels, 5, axis=1), np.delete(colours >> 8, 5, axis=1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparency_of_little_grey_shows_white(bits: int) -> None:
    largest = 2**bits - 1
    row = np.minimum(np.arange(WIDTH), largest)
    packed = np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, -bits:])
    rows = (b"\0" + packed.tobytes()) * HEIGHT
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", header),
            (b"tRNS", struct.pack(">H", largest - 1)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
    )
    expected = np.where(row == largest - 1, 255, row * 255 // largest)
    assert np.array_equal(np.asarray(decode(raw))[0, :, 0], expected)


def test_colours_of_jpeg_2000_are_dark_only_where_they_have_16_bits() -> None:
    """Pillow writes no such colours, so the header of a file of 8 bits is changed after it was read."""
    stream = io.BytesIO()
    Image.fromarray((COLOURS >> 12).astype(np.uint8)).save(stream, "JPEG2000", no_jp2=True)
    for bits, white in ((8, None), (12, 65535), (16, None)):
        raw = stream.getvalue()
        for component in range(3):
            at = raw.index(b"\xff\x51") + 40 + 3 * component
            raw = raw[:at] + bytes([bits - 1]) + raw[at + 1 :]
        with Image.open(io.BytesIO(stream.getvalue())) as image:
            said = samples(image, raw)
            assert said == Samples(bits=8 if bits == 8 else 16, white=white)
            if bits == 16:
                with pytest.raises(ImageRejectedError, match="at most 4,095: 12 bits"):
                    to_rgb(image, raw, said)
            else:
                assert to_rgb(image, raw, said).mode == "RGB"


def test_alpha_of_16_bits_shows_white() -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    alpha[:, :10] = 0
    for colours, kind in ((RAMP[..., None], 4), (COLOURS, 6)):
        pixels = np.asarray(decode(png(np.concatenate([colours, alpha], -1), kind)))
        assert (pixels[:, :10] == 255).all()
        assert np.array_equal(pixels[:, 10:], np.broadcast_to(colours >> 8, (HEIGHT, WIDTH, 3))[:, 10:])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(tiff(RAMP_12.tobytes(), 16, 1), "at most 3,937: 12 bits without a tag", id="grey"),
        pytest.param(tiff(RAMP_12.tobytes(), 16, 0), "at most 3,937: 12 bits", id="white-is-zero"),
        pytest.param(png(RAMP_12, 0), "at most 3,937: 12 bits", id="png"),
        pytest.param(png(RAMP >> 2, 0), "at most 15,750: 14 bits without a tag", id="png-14"),
        pytest.param(png(COLOURS >> 2, 2), "at most 15,871: 14 bits", id="png-colour-14"),
        pytest.param(tiff((RAMP >> 2).tobytes(), 16, 1), "at most 15,750: 14 bits", id="grey-14"),
        pytest.param(jpeg2000(RAMP_12), "at most 3,937: 12 bits", id="jpeg-2000"),
        pytest.param(png(COLOURS >> 4, 2), "at most 4,095: 12 bits", id="png-colour"),
        pytest.param(pgm(RAMP_12, 65535), "at most 3,937: 12 bits", id="pgm"),
        pytest.param(tiff((COLOURS >> 4).tobytes(), 16, 2, 3), "at most 4,095: 12 bits", id="colour"),
        pytest.param(
            tiff((COLOURS >> 4).tobytes(), 16, 2, 3, t341=4095), "up to 4,095 in 16 bits", id="colour-tag"
        ),
        pytest.param(tiff(COLOURS.tobytes(), 16, 2, 3, t284=2), "separate planes", id="planes"),
        pytest.param(tiff((RAMP // 2).tobytes(), 16, 1, t339=2), "16-bit signed integers", id="signed"),
        pytest.param(tiff(RAMP.astype("<u4").tobytes(), 32, 1), "32-bit unsigned integers", id="32-bit"),
    ],
)
def test_where_white_is_not_known_the_reason_says_why(raw: bytes, reason: str) -> None:
    with pytest.raises(ImageRejectedError, match=reason) as caught:
        decode(raw)
    assert caught.value.kind == "value_range"


def test_kinds_that_pillow_does_not_read_are_told_from_files_that_are_no_images() -> None:
    with pytest.raises(ImageRejectedError, match="TIFF with a damaged header or an unusual number of bits"):
        decode(tiff(in_12_bits(), 12, 0))
