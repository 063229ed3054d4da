"""Images with zeros in place of their data are rejected, and good ones that hold many zeros are not."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from beit_dist.images.damage import _check_deflate
from beit_dist.images.decoding import decode
from beit_dist.images.heif_items import coded_items
from beit_dist.images.jpeg2000_tiles import sample_bits, tiles
from beit_dist.images.jpeg_scans import check_scans, with_longer_scans
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.images.webp_pictures import coded_parts

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
        decode(with_zeros(raw, raw.index(b"\xff\xda\0\x08\1") + 300, 256))


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("place", PLACES)
def test_a_jpeg_from_which_bytes_are_missing_is_rejected(mode: str, options: dict[str, Any], place: float) -> None:
    """A page is lost, or the rest of a download that was closed with an end marker."""
    raw = encoded(photo(960, 720).convert(mode), "JPEG", **options)
    first = raw.index(b"\xff\xda") + 14
    at = first + int(place * (len(raw) - first - 4098))
    for damaged in (raw[:at] + raw[at + 4096 :], raw[:at] + b"\xff\xd9"):
        with pytest.raises(ImageRejectedError, match=r"too little data|are missing|restart intervals") as caught:
            decode(damaged)
        assert caught.value.kind == "damaged"


def test_a_jpeg_without_its_last_scan_is_rejected() -> None:
    raw = encoded(PHOTO, "JPEG", progressive=True)
    with pytest.raises(ImageRejectedError, match="scans are missing: 63 coefficients are not complete"):
        decode(raw[: raw.rindex(b"\xff\xda")] + b"\xff\xd9")


def test_zeros_behind_the_headers_are_no_reason_to_refuse_what_lies_between_them() -> None:
    stray, exif = b"\x12\x34\x56", b"Exif\0\0" + bytes(5000)
    raw = encoded(PHOTO, "JPEG", exif=exif)
    at = raw.index(b"\xff\xda")
    decode(raw[:at] + stray + raw[at:])
    with pytest.raises(ImageRejectedError, match="of no segment"):
        decode(raw[:at] + bytes(512) + raw[at:])


def test_a_flat_lossless_jpeg_is_one_run_of_zeros() -> None:
    frame = b"\xff\xc3" + struct.pack(">HBHHBBBB", 11, 8, 400, 400, 1, 1, 0x11, 0)
    table = b"\xff\xc4" + struct.pack(">HB", 20, 0) + b"\1" + bytes(15) + b"\0"
    raw = b"\xff\xd8" + frame + table + b"\xff\xda\0\x08\1\1\0\1\0\0" + bytes(400 * 400 // 8) + b"\xff\xd9"
    assert decode(raw).getpixel((9, 9)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"\xff\xda\0\x08\1\x09\0\0\x3f\0", "a component that the frame header does not name"),
        (b"\xff\xda\0\x02", "a scan header of 0 bytes"),
        (b"\xff\xda\0\x04\1\1", "a scan header of 2 bytes"),
        (b"\xff\xc0\0\x04\x08\0", "a frame header of 2 bytes"),
        (b"\xff\xdb\0\x04\0\0", "a quantization step of 0"),
    ],
)
def test_headers_that_make_no_sense_are_named(header: bytes, reason: str) -> None:
    raw = encoded(PHOTO.convert("L"), "JPEG")
    at = raw.index(b"\xff\xda")
    for check in (check_scans, with_longer_scans):
        with pytest.raises(ImageRejectedError, match=reason):
            check(raw[:at] + header + raw[at:])


def test_restart_markers_bound_the_zeros_of_a_flat_region() -> None:
    raw = encoded(PRODUCT, "JPEG", optimize=True, restart_marker_rows=1)
    with pytest.raises(ImageRejectedError, match="data that can hold 114 in a row"):
        decode(with_zeros(raw, len(raw) // 2, 1024))


OURS = r"zero bytes at byte|crc32 of|deflate stream"


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("WEBP", {"quality": 80}, id="webp"),
        pytest.param("WEBP", {"lossless": True, "method": 1}, id="webp-lossless"),
        pytest.param("AVIF", {"speed": 10, "quality": 90}, id="avif", marks=AVIF),
        pytest.param("JPEG2000", {}, id="jpeg2000"),
    ],
)
def test_other_formats_with_zeros_are_rejected(kind: str, options: dict[str, Any], at_end: bool) -> None:
    raw = encoded(PHOTO, kind, **options)
    decode(raw)
    end = raw.rfind(b"\xff\xd9") if kind == "JPEG2000" else len(raw)
    with pytest.raises(ImageRejectedError, match=OURS):
        decode(with_zeros(raw, end - 4096 if at_end else len(raw) // 2, 4096))


def tiff_strip(kind: str, data: bytes, size: int) -> bytes:
    """A grey TIFF of 256 columns and one strip."""
    compression = {"lzw": 5, "packbits": 32773, "jpeg": 7}[kind]
    tags = {256: 256, 257: size, 258: 8, 259: compression, 262: 1, 273: 8, 277: 1, 278: size, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def test_packed_tiffs_that_libtiff_takes_are_rejected() -> None:
    """PackBits reads zeros as a zero each two bytes; a JPEG inside is decoded with warnings only."""
    packed = b"".join(b"\xff\x07\x7f" + bytes(range(1, 129)) for _ in range(60))
    zeros = packed[:1000] + bytes(400) + packed[1000:]
    decode(tiff_strip("packbits", packed, 20))
    with pytest.raises(ImageRejectedError, match="400 zero bytes at byte 1,008"):
        decode(tiff_strip("packbits", zeros, 20))
    jpeg = encoded(photo(256, 240).convert("L"), "JPEG", quality=95)
    decode(tiff_strip("jpeg", jpeg, 240))
    with pytest.raises(ImageRejectedError, match="zero bytes at byte"):
        decode(tiff_strip("jpeg", with_zeros(jpeg, len(jpeg) // 2, 1024), 240))


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


@pytest.mark.parametrize("place", [0.5, 0.9])
def test_zeros_in_packed_alpha_are_found(place: float) -> None:
    image = PHOTO.convert("RGBA")
    image.putalpha(photo(480, 360).transpose(Image.Transpose.ROTATE_180).convert("L"))
    raw = encoded(image, "WEBP", quality=80)
    start = raw.index(b"ALPH") + 8
    length = int.from_bytes(raw[start - 4 : start], "little")
    assert raw[start] & 3 == 1
    decode(raw)
    with pytest.raises(ImageRejectedError, match=OURS):
        decode(with_zeros(raw, start + int(place * (length - 4096)), 4096))


def boolean_coded(bits: list[int]) -> bytes:
    """RFC 6386, 7.3, for bits that are as often 1 as 0, in exact arithmetic."""
    bottom, width, shifted = 0, 255, 0
    for bit in bits:
        split = 1 + ((width - 1) * 128 >> 8)
        bottom, width = (bottom + split, width - split) if bit else (bottom, split)
        while width < 128:
            bottom, width, shifted = bottom << 1, width << 1, shifted + 1
    unused = -shifted % 8
    return (bottom << unused).to_bytes((8 + shifted + unused) // 8, "big")


@pytest.mark.parametrize(("code", "count"), [((0, 0), 1), ((0, 1), 2), ((1, 1), 8)])
def test_partitions_of_a_webp_are_looked_at_one_by_one(code: tuple[int, int], count: int) -> None:
    segments = [1, 1, 1, 0, *([1] + [0] * 8) * 4, *([1] + [1] * 7) * 4, *([1] + [0] * 8) * 3]
    modes = boolean_coded([0, 1, *segments, *[1] * 10, 1, 1, *([1] + [1] * 7) * 8, *code])
    sizes = [100 + number for number in range(count)]
    table = b"".join(size.to_bytes(3, "little") for size in sizes[:-1])
    frame = (len(modes) << 5).to_bytes(3, "little") + bytes(7) + modes + table + bytes(sum(sizes))
    raw = b"RIFF" + struct.pack("<I", len(frame) + 12) + b"WEBPVP8 " + struct.pack("<I", len(frame)) + frame
    assert [end - start for start, end in coded_parts(raw)] == [len(modes), *sizes]


def test_a_few_zeros_at_the_end_of_a_webp_are_tried() -> None:
    raw = encoded(PHOTO, "WEBP", quality=90)
    with pytest.raises(ImageRejectedError, match="the picture is full"):
        decode(with_zeros(raw, len(raw) - 48, 48))


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def test_the_codestream_of_a_jpeg_2000_is_found_by_its_boxes() -> None:
    raw = encoded(PHOTO, "JPEG2000")
    at = raw.index(b"jp2c") - 4
    decoy = box(b"uuid", bytes(16) + b"\xff\x4f\xff\x51" + bytes(500))
    started = time.monotonic()
    assert decode(raw[:at] + decoy + raw[at:]).size == PHOTO.size
    with pytest.raises(ImageRejectedError, match=OURS):
        decode(raw[:at] + decoy + with_zeros(raw[at:], len(raw) // 2, 4096))
    for broken in (b"", b"\xff\x4f\xff\x51", decoy, raw[:at] + decoy, raw[: at + 60], raw[: at + 30] + bytes(99)):
        assert tiles(broken) == []
        assert sample_bits(broken) <= 8
    assert time.monotonic() - started < 5


def test_a_checkerboard_in_jpeg_2000_is_no_damage() -> None:
    fields = (np.indices((1200, 1200)) // 8).sum(axis=0) % 2 * 255
    for options in ({}, {"tile_size": (256, 256)}):
        decode(encoded(Image.fromarray(fields.astype(np.uint8)).convert("RGB"), "JPEG2000", **options))


def test_zeros_that_pass_for_empty_packets_of_many_layers_are_found() -> None:
    layers = {"quality_mode": "rates", "quality_layers": [80, 40, 20, 10, 5], "precinct_size": (128, 128)}
    raw = encoded(PHOTO, "JPEG2000", irreversible=True, **layers)
    decode(raw)
    with pytest.raises(ImageRejectedError, match=OURS):
        decode(with_zeros(raw, len(raw) * 2 // 5, 4096))


def test_an_avif_of_endless_extents_costs_no_more_than_another() -> None:
    """Extents of no bytes, millions by their counts; and a second ``meta``, which decoders do not read."""
    entry = box(b"infe", b"\2\0\0\0" + struct.pack(">HH", 1, 0) + b"av01\0")
    information = box(b"iinf", bytes(4) + struct.pack(">H", 1) + entry)
    items = b"".join(struct.pack(">HHH", 1, 0, 65535) for _ in range(300))
    places = box(b"iloc", bytes(4) + b"\0\0" + struct.pack(">H", 65535) + items)
    meta = box(b"meta", bytes(4) + information + places)
    started = time.monotonic()
    assert list(coded_items(meta + bytes(1000))) == [(0, len(meta) + 1000)]
    assert list(coded_items(box(b"meta", bytes(4)) + meta)) == []
    for cut in range(0, len(meta), 97):
        list(coded_items(meta[:cut]))
    many = b"".join(struct.pack(">HHH", 1, 0, 65535) + struct.pack(">HH", n, 0) * 65535 for n in range(2))
    places = box(b"iloc", b"\1\0\0\0\x22\0" + struct.pack(">H", 2) + many)
    list(coded_items(box(b"meta", bytes(4) + information + places)))
    assert time.monotonic() - started < 5


def test_zeros_in_a_heic_are_found() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install 'beit_dist[heif]'")
    stream = io.BytesIO()
    pillow_heif.from_pillow(PHOTO).save(stream, quality=80)
    raw = stream.getvalue()
    decode(raw)
    for place in (0.3, 0.9):
        with pytest.raises(ImageRejectedError, match=r"zero bytes at byte|Error"):
            decode(with_zeros(raw, int(len(raw) * place), 512))
    assert list(coded_items(raw))


def test_a_large_deflated_tiff_costs_no_more_than_its_size() -> None:
    """What a stream has not consumed is copied: fed whole, each piece of a long one would copy the rest of it."""
    packed = zlib.compress(np.random.default_rng(0).integers(0, 256, 40 << 20, dtype=np.uint8).tobytes(), 1)
    started = time.process_time()
    _check_deflate(packed, 0)
    assert time.process_time() - started < 1.5


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
