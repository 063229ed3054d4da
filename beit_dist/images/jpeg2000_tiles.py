"""Where the packets of a JPEG 2000 file lie, and what its headers say of them (ITU-T T.800, A and B)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from beit_dist.images.iso_boxes import boxes, number

_START = b"\xff\x4f\xff\x51"
_SIZ, _COD, _SOT, _SOD, _EOC = 0xFF51, 0xFF52, 0xFF90, 0xFF93, b"\xff\xd9"


class _Coding(NamedTuple):
    """Payloads of the main header's segments."""

    siz: bytes
    cod: bytes


@dataclass
class Tile:
    """From the first packet of a tile to its last; those of other tiles may lie between."""

    start: int
    end: int


def sample_bits(raw: bytes) -> int:
    """Bits of the deepest component; 0 if the file does not tell."""
    siz = _main_header(raw, *_codestream(raw))[0].siz
    return max(((depth & 127) + 1 for depth in siz[36::3]), default=0)


def tiles(raw: bytes) -> list[Tile]:
    """The tiles whose beginning the file holds."""
    start, end = _codestream(raw)
    _, at = _main_header(raw, start, end)
    found: dict[int, Tile] = {}
    while at + 12 <= end and number(raw, at, 2) == _SOT:
        length = number(raw, at + 6, 4)
        last = at + length if length >= 12 else end
        packets = next((place for kind, place, _ in _segments(raw, at, end) if kind == _SOD), end)
        if last >= end:  # the last one: behind its end marker anything may follow
            eoc = raw.find(_EOC, packets, end)
            last = eoc if eoc >= 0 else end
        tile = found.setdefault(number(raw, at + 4, 2), Tile(packets, last))
        tile.end = max(tile.end, last)
        at = max(last, at + 12)
    return list(found.values())


def most_zeros(raw: bytes) -> int:
    """Bytes of zeros that the packets of a tile may begin with and nothing else.

    An empty packet is a zero byte, and in the header of another a code-block that adds nothing is a zero bit, and
    so is each node of the tag tree above it, a third as many (A.5.1, A.6.1, B.10).
    """
    siz, cod = _main_header(raw, *_codestream(raw))[0]
    if len(siz) < 36 or len(cod) < 10:
        return 0
    across, down = (min(number(siz, 18 + at, 4), number(siz, 2 + at, 4)) for at in (0, 4))  # of a tile
    layers, levels = number(cod, 2, 2), min(cod[5], 32)
    sizes = cod[10 : 11 + levels] if cod[0] & 1 else b"\xff" * (levels + 1)
    precincts, blocks = 0, 0
    width, height = (cod[6] & 15) + 2, (cod[7] & 15) + 2
    for resolution, size in enumerate(sizes):
        shrunk = levels - resolution
        precincts += ((across >> shrunk + (size & 15)) + 2) * ((down >> shrunk + (size >> 4)) + 2)
        blocks += ((across >> shrunk + width) + 2) * ((down >> shrunk + height) + 2)
    return layers * number(siz, 34, 2) * (precincts + blocks * 4 // 3 // 8)


def _codestream(raw: bytes) -> tuple[int, int]:
    if raw.startswith(_START):
        return 0, len(raw)
    return next(((start, end) for kind, start, end in boxes(raw, 0, len(raw)) if kind == b"jp2c"), (0, 0))


def _main_header(raw: bytes, start: int, end: int) -> tuple[_Coding, int]:
    """What it says, and where it ends."""
    siz = cod = b""
    for kind, at, payload in _segments(raw, start + 2, end):
        if kind == _SOT:
            return _Coding(siz, cod), at
        siz, cod = payload if kind == _SIZ else siz, payload if kind == _COD else cod
    return _Coding(siz, cod), end


def _segments(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Marker, place and payload of each segment; of SOD the place behind it, and then no more."""
    while at + 4 <= end:
        kind, length = number(raw, at, 2), number(raw, at + 2, 2)
        if kind == _SOD:
            yield kind, at + 2, b""
            return
        if kind < 0xFF01 or length < 2:
            return
        yield kind, at, raw[at + 4 : at + 2 + length]
        at += 2 + length
