"""Damage that decoders paint over: an image whose bytes cannot all be those that were written.

Pillow turns errors of its libraries into exceptions, but not their warnings, and some libraries do not even warn.
So the bytes are looked at, once they are decoded: checksums where a format has them, and runs of zeros in data
that an entropy coder wrote. Formats that store pixels as they are (BMP, PPM, plain TIFF) can be damaged unseen.
"""

from __future__ import annotations

import functools
import io
import zlib

from PIL import Image

from beit_dist.images.heif_items import coded_items
from beit_dist.images.jpeg2000_tiles import most_zeros, tiles
from beit_dist.images.jpeg_decoders import Pixels
from beit_dist.images.jpeg_ends import may_end_early
from beit_dist.images.jpeg_scans import suspicious_scans, with_longer_scans
from beit_dist.images.left_over import Piece, check_drawn, suspicious
from beit_dist.images.rejection import damaged
from beit_dist.images.webp_pictures import coded_parts
from beit_dist.images.zero_runs import check_zeros

_DEFLATE, _JPEG, _DENSE = {8, 32946}, {7}, {5, 32773}
"""TIFF compressions: zlib streams; JPEG; LZW and PackBits, which have short codes for repeated bytes."""
_TIFF_COMPRESSION, _TIFF_JPEG_TABLES = 259, 347
_TIFF_PIECES = ((273, 279), (324, 325))
"""Offsets and sizes of strips, and of tiles."""

_LOOKED_AT = 2
"""Pieces of a file, of those with the most zeros: each costs more decodings."""

_AT_END = 8
"""Zeros that are looked at where they touch the end of a WebP's data: few good files have them."""
_PATTERN = 256
"""Zeros that a good JPEG 2000 may hold in any case: of a checkerboard of 8 px, coded data has 237 in a row."""
_FED, _UNPACKED = 64 << 10, 1 << 20
"""Bytes of a deflate stream at a time. (What is not consumed is copied.)"""


def check_whole(image: Image.Image, raw: bytes, pixels: Pixels | None = None, scale: int = 1) -> None:
    """Check that the file an image was decoded from is not damaged in a way that its decoder did not report.

    Args:
        image: loaded, as Pillow opened it.
        pixels: what another decoder has made of a JPEG, which is then not loaded.
        scale: by how much they were shrunk in decoding.

    Raises:
        ImageRejectedError: it is, of the kind ``damaged``.
    """
    if image.format in ("JPEG", "MPO"):
        _check_jpeg(image, raw, pixels, scale)
    elif image.format == "PNG":
        _check_png(raw)
    elif image.format == "WEBP":
        _check_webp(image, raw)
    elif image.format in ("AVIF", "HEIF"):
        for start, end in coded_items(raw):
            check_zeros(raw, start, end)
    elif image.format == "JPEG2000":
        _check_jpeg2000(image, raw)
    elif image.format == "TIFF":
        _check_tiff(image, raw)


def _check_jpeg(image: Image.Image, raw: bytes, pixels: Pixels | None, scale: int) -> None:
    pieces, decode = suspicious_scans(raw), functools.partial(_pixels, kind="JPEG")
    if not pieces and not may_end_early(image, raw, pixels, scale):
        return
    if scale > 1:
        drawn = decode(raw)
    else:
        drawn = image.tobytes() if pixels is None else pixels.tobytes()
    if pieces:
        check_drawn(raw, _with_most_zeros(pieces), drawn, decode)
    if decode(with_longer_scans(raw)) != drawn:
        raise damaged("a scan has too little data, so that part of the picture is made up")


def _with_most_zeros(pieces: list[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda piece: piece.zeros.length)[-_LOOKED_AT:]


def _pixels(raw: bytes, kind: str) -> bytes:
    with Image.open(io.BytesIO(raw), formats=[kind]) as image:
        pixels: bytes = image.tobytes()
        return pixels


def _check_webp(image: Image.Image, raw: bytes) -> None:
    parts = coded_parts(raw)
    pieces = [piece for start, end in parts for piece in suspicious(raw, start, end, at_end=_AT_END)]
    if pieces:
        check_drawn(raw, _with_most_zeros(pieces), image.tobytes(), functools.partial(_pixels, kind="WEBP"))


def _check_jpeg2000(image: Image.Image, raw: bytes) -> None:
    pieces = [piece for tile in tiles(raw) for piece in suspicious(raw, tile.start, tile.end)]
    if pieces:
        most = _PATTERN + most_zeros(raw)
        for piece in pieces:
            check_zeros(raw, piece.start, piece.end, most)
        check_drawn(raw, _with_most_zeros(pieces), image.tobytes(), functools.partial(_pixels, kind="JPEG2000"))


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
    unpacking, view, at = zlib.decompressobj(), memoryview(packed), 0
    try:
        while not unpacking.eof and (at < len(view) or unpacking.unconsumed_tail):
            if not unpacking.unconsumed_tail:
                fed, at = bytes(view[at : at + _FED]), at + _FED
            else:
                fed = unpacking.unconsumed_tail
            unpacking.decompress(fed, _UNPACKED)
    except zlib.error as error:
        raise damaged(f"deflate stream at byte {start:,}: {error}") from None
    if not unpacking.eof:
        raise damaged(f"deflate stream at byte {start:,}: it does not end where it should")


def _several(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
