"""The boxes that AVIF, HEIC and JPEG 2000 files are made of (ISO/IEC 14496-12, 4.2; ITU-T T.800, I.4)."""

from __future__ import annotations

from collections.abc import Iterator


def boxes(raw: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each box in ``raw[start:end]``; nothing behind a broken one."""
    while start + 8 <= end:
        size, kind, head = number(raw, start, 4), raw[start + 4 : start + 8], 8
        if size == 1:
            size, head = number(raw, start + 8, 8), 16
        elif size == 0:
            size = end - start
        if size < head:
            return
        yield kind, start + head, min(start + size, end)
        start += size


def number(raw: bytes, at: int, size: int) -> int:
    """A big-endian number of ``size`` bytes; of fewer where the file ends."""
    return int.from_bytes(raw[at : at + size], "big")
