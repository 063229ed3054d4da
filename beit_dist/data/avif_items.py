"""Where the coded pictures of an AVIF file lie (ISO/IEC 23008-12, and 14496-12 for the boxes)."""

from __future__ import annotations

from collections.abc import Iterator


def coded_items(raw: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each extent of AV1 data: the picture's and its alpha's, without EXIF, XMP and the like."""
    for kind, start, end in _boxes(raw, 0, len(raw)):
        if kind != b"meta":
            continue
        children = {name: (first, last) for name, first, last in _boxes(raw, start + 4, end)}
        if b"iinf" not in children or b"iloc" not in children:
            continue
        coded = set(_items_of(raw, *children[b"iinf"], b"av01"))
        for item, first, last in _extents(raw, children[b"iloc"][0]):
            if item in coded:
                yield first, last


def _boxes(raw: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each box."""
    while start + 8 <= end:
        size, kind, head = _number(raw, start, 4), raw[start + 4 : start + 8], 8
        if size == 1:
            size, head = _number(raw, start + 8, 8), 16
        elif size == 0:
            size = end - start
        if size < head:
            return
        yield kind, start + head, min(start + size, end)
        start += size


def _items_of(raw: bytes, start: int, end: int, wanted: bytes) -> Iterator[int]:
    """Ids of the items of one type."""
    start += 6 if raw[start] == 0 else 8  # version and flags, number of entries
    for kind, at, _ in _boxes(raw, start, end):
        width = 4 if raw[at] == 3 else 2  # by the entry's version
        if kind == b"infe" and raw[at + 6 + width : at + 10 + width] == wanted:
            yield _number(raw, at + 4, width)


def _extents(raw: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Item, start and end in the file of each extent."""
    version = raw[at]
    offset_size, length_size = raw[at + 4] >> 4, raw[at + 4] & 15
    base_size, index_size = raw[at + 5] >> 4, raw[at + 5] & 15 if version else 0
    width = 4 if version == 2 else 2
    count, at = _number(raw, at + 6, width), at + 6 + width
    for _ in range(count):
        item, at = _number(raw, at, width), at + width
        method = 0
        if version:
            method, at = raw[at + 1] & 15, at + 2
        base, at = _number(raw, at + 2, base_size), at + 2 + base_size  # after the number of a file
        extents, at = _number(raw, at, 2), at + 2
        for _ in range(extents):
            at += index_size
            offset = base + _number(raw, at, offset_size)
            length = _number(raw, at + offset_size, length_size) or len(raw)
            at += offset_size + length_size
            if method == 0:  # of the file, not of a box or another item
                yield item, offset, min(offset + length, len(raw))


def _number(raw: bytes, at: int, size: int) -> int:
    return int.from_bytes(raw[at : at + size], "big")
