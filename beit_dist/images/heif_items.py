"""Where the coded pictures of an AVIF or HEIC file lie (ISO/IEC 23008-12, and 14496-12 for the boxes)."""

from __future__ import annotations

from collections.abc import Iterator

from beit_dist.images.iso_boxes import boxes, number

_CODED = {b"av01", b"hvc1"}


def coded_items(raw: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of coded data: the picture's, its tiles' and its alpha's, without EXIF, XMP and the like.

    What several extents share comes once, so that hostile files cost no more than others.
    """
    reached = 0
    for first, last in sorted(_coded_extents(raw)):
        if last > reached:
            yield max(first, reached), last
            reached = last


def _coded_extents(raw: bytes) -> set[tuple[int, int]]:
    """From the first ``meta`` box, as decoders read no other."""
    meta = next(((start, end) for kind, start, end in boxes(raw, 0, len(raw)) if kind == b"meta"), None)
    if meta is None:
        return set()
    children = {name: (first, last) for name, first, last in boxes(raw, meta[0] + 4, meta[1])}
    if b"iinf" not in children or b"iloc" not in children:
        return set()
    coded = set(_items_of(raw, *children[b"iinf"]))
    return {(first, last) for item, first, last in _extents(raw, *children[b"iloc"]) if item in coded}


def _items_of(raw: bytes, start: int, end: int) -> Iterator[int]:
    """Ids of the items that hold coded pictures."""
    start += 8 if number(raw, start, 1) else 6  # version and flags, number of entries
    for kind, at, _ in boxes(raw, start, end):
        width = 4 if number(raw, at, 1) == 3 else 2  # by the entry's version
        if kind == b"infe" and raw[at + 6 + width : at + 10 + width] in _CODED:
            yield number(raw, at + 4, width)


def _extents(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Item, start and end in the file of each extent."""
    version, sizes, more = (number(raw, at + offset, 1) for offset in (0, 4, 5))
    offset_size, length_size = sizes >> 4, sizes & 15
    base_size, index_size = more >> 4, more & 15 if version else 0
    width = 4 if version == 2 else 2
    at += 6 + width  # behind the number of items, which the end of the box tells as well
    while at < end:
        item, at = number(raw, at, width), at + width
        method = 0
        if version:
            method, at = number(raw, at + 1, 1) & 15, at + 2
        base, at = number(raw, at + 2, base_size), at + 2 + base_size  # after the number of a file
        extents, at = number(raw, at, 2), at + 2
        step = index_size + offset_size + length_size
        for _ in range(min(extents, (end - at) // step) if step else min(extents, 1)):
            offset = base + number(raw, at + index_size, offset_size)
            length = number(raw, at + index_size + offset_size, length_size) or len(raw)
            at += step
            if method == 0:  # of the file, not of a box or another item
                yield item, offset, min(offset + length, len(raw))
