"""Damage that decoders paint over: an image whose bytes cannot all be those that were written.

Pillow turns errors of its libraries into exceptions, but not their warnings, and some libraries do not even warn.
So the bytes are looked at, once they are decoded: checksums where a format has them, and runs of zeros in data
that an entropy coder wrote. Formats that store pixels as they are (BMP, PPM, plain TIFF) can be damaged unseen.
"""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Iterator

from PIL import Image

from beit_dist.data.avif_items import coded_items
from beit_dist.data.jpeg_scans import suspicious_scans, with_longer_scans
from beit_dist.data.left_over import check_drawn, suspicious
from beit_dist.data.rejection import damaged
from beit_dist.data.zero_runs import SHORTEST, check_zeros

_DEFLATE, _JPEG, _DENSE = {8, 32946}, {7}, {5, 32773}
"""TIFF compressions: zlib streams; JPEG; LZW and PackBits, which have short codes for repeated bytes."""
_TIFF_COMPRESSION, _TIFF_JPEG_TABLES = 259, 347
_TIFF_PIECES = ((273, 279), (324, 325))
"""Offsets and sizes of strips, and of tiles."""

_LOOKED_AT = 2
"""Pieces of a file, of those with the most zeros: each costs more decodings."""


def check_whole(image: Image.Image, raw: bytes) -> None:
    """Check that the file an image was decoded from is not damaged in a way that its decoder did not report.

    Args:
        image: loaded, as Pillow opened it.

    Raises:
        ImageRejectedError: it is, of the kind ``damaged``.
    """
    if image.format in ("JPEG", "MPO"):
        _check_jpeg(image, raw)
    elif image.format == "PNG":
        _check_png(raw)
    elif image.format == "WEBP":
        _check_webp(image, raw)
    elif image.format == "AVIF":
        for start, end in coded_items(raw):
            check_zeros(raw, start, end)
    elif image.format == "JPEG2000":
        start = raw.index(b"\xff\x4f\xff\x51")
        end = raw.find(b"\xff\xd9", start)  # no such bytes in coded data; behind them anything may follow
        check_zeros(raw, start, end if end >= 0 else len(raw), SHORTEST + _empty_packets(raw, start + 2))
    elif image.format == "TIFF":
        _check_tiff(image, raw)


def _check_jpeg(image: Image.Image, raw: bytes) -> None:
    pieces = suspicious_scans(raw)
    if not pieces:
        return
    pixels, decode = image.tobytes(), functools.partial(_pixels, kind="JPEG")
    most = sorted(pieces, key=lambda piece: piece.zeros.length)[-_LOOKED_AT:]
    check_drawn(raw, most, pixels, decode)
    if decode(with_longer_scans(raw, pieces)) != pixels:
        raise damaged(
            f"{most[-1].zeros.length:,} zero bytes at byte {most[-1].zeros.start:,}, and too little data"
        )


def _pixels(raw: bytes, kind: str) -> bytes:
    with Image.open(io.BytesIO(raw), formats=[kind]) as image:
        pixels: bytes = image.tobytes()
        return pixels


def _check_webp(image: Image.Image, raw: bytes) -> None:
    pieces = [piece for start, end in _webp_pictures(raw, 12, len(raw)) for piece in suspicious(raw, start, end)]
    if pieces:
        check_drawn(raw, pieces[:_LOOKED_AT], image.tobytes(), functools.partial(_pixels, kind="WEBP"))


def _check_png(raw: bytes) -> None:
    """Compare the checksums of the chunks that make up the picture, which Pillow does not."""
    position = 8
    while position + 8 <= len(raw):
        length, kind = int.from_bytes(raw[position : position + 4], "big"), raw[position + 4 : position + 8]
        end = position + 8 + length
        stored = raw[end : end + 4]
        if kind == b"IEND" or len(stored) < 4:
            return
        if kind[:1].isupper() or kind == b"tRNS":
            found = zlib.crc32(memoryview(raw)[position + 4 : end])
            if found != int.from_bytes(stored, "big"):
                raise damaged(
                    f"crc32 of the {kind.decode('ascii', 'replace')} chunk at byte {position:,} is wrong"
                )
        position = end + 4


def _webp_pictures(raw: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The coded data, of frames too; not alpha, which may be stored as it is: zeros are transparent pixels."""
    while start + 8 <= end:
        kind, length = raw[start : start + 4], int.from_bytes(raw[start + 4 : start + 8], "little")
        start += 8
        if kind == b"VP8L":
            yield start, min(start + length, end)
        elif kind == b"VP8 ":
            modes = int.from_bytes(raw[start : start + 3], "little") >> 5  # bytes of the first partition
            yield start + 10, min(start + 10 + modes, end)
            yield start + 10 + modes, min(start + length, end)
        elif kind == b"ANMF":
            yield from _webp_pictures(raw, start + 16, min(start + length, end))
        start += length + length % 2


def _empty_packets(raw: bytes, position: int) -> int:
    """How many packets of a JPEG 2000 tile may be empty, a zero byte each (ITU-T T.800, A.5.1, A.6.1, B.10)."""
    across, down = (int.from_bytes(raw[at : at + 4], "big") for at in (position + 22, position + 26))  # of a tile
    components = int.from_bytes(raw[position + 38 : position + 40], "big")
    while raw[position : position + 2] != b"\xff\x52":
        position += 2 + int.from_bytes(raw[position + 2 : position + 4], "big")
    layers, levels = int.from_bytes(raw[position + 6 : position + 8], "big"), raw[position + 9]
    sizes = raw[position + 14 : position + 15 + levels] if raw[position + 4] & 1 else b"\xff" * (levels + 1)
    precincts = 0
    for resolution, size in enumerate(sizes):
        shrunk = levels - resolution
        precincts += ((across >> shrunk + (size & 15)) + 2) * ((down >> shrunk + (size >> 4)) + 2)
    return layers * components * precincts


def _check_tiff(image: Image.Image, raw: bytes) -> None:
    tags = getattr(image, "tag_v2", {})
    compression, tables = tags.get(_TIFF_COMPRESSION), tags.get(_TIFF_JPEG_TABLES, b"")
    for offsets, sizes in _TIFF_PIECES:
        for start, size in zip(_several(tags.get(offsets, ())), _several(tags.get(sizes, ())), strict=False):
            if compression in _DEFLATE:
                _check_deflate(raw[start : start + size], start)
            elif compression in _DENSE:
                check_zeros(raw, start, start + size)
            elif compression in _JPEG:
                # Without pixels to compare: what flat regions explain passes.
                suspicious_scans((tables[:-2] or b"\xff\xd8") + raw[start + 2 : start + size])


def _check_deflate(packed: bytes, start: int) -> None:
    """Compare the checksum at the end of a zlib stream, which libtiff does not read."""
    unpacking = zlib.decompressobj()
    try:
        while packed and not unpacking.eof:
            unpacking.decompress(packed, 1 << 20)
            packed = unpacking.unconsumed_tail
    except zlib.error as error:
        raise damaged(f"deflate stream at byte {start:,}: {error}") from None
    if not unpacking.eof:
        raise damaged(f"deflate stream at byte {start:,}: it does not end where it should")


def _several(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
