"""Zeros in the scans of a JPEG, as a lost disk block or an interrupted download leaves them.

libjpeg draws something for any bits and only warns, which Pillow tells nobody. What the file itself tells: its
Huffman tables say what a run of zero bits means, and how long the longest is that an encoder can have written.
Names and tables are those of ITU-T T.81.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from beit_dist.data.left_over import Piece, suspicious
from beit_dist.data.rejection import damaged
from beit_dist.data.zero_runs import SHORTEST, check_zeros, zero_runs

_MARKER = re.compile(rb"\xff[^\x00\xff]")
"""FF 00 is a byte of data, and FF may be repeated before a marker. (With ``\xff+`` it is twenty times as slow.)"""
_SOI, _EOI, _SOS, _DQT, _DHT, _DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE, _ARITHMETIC = {0xC2, 0xCA}, {0xC9, 0xCA}

_LARGEST_DC = 2048
"""DC coefficients of 8-bit samples lie in -1024 to 1023, so that a drift ends after this (F.1.2.1)."""
_CORRECTIONS = 1024 // 8
"""Bytes of correction bits that encoders hold back and then write in one piece (libjpeg: at most 1,000 bits)."""


class _FirstCode(NamedTuple):
    """What zero bits stand for in a Huffman table."""

    bits: int
    symbol: int


class _Component(NamedTuple):
    across: int
    down: int
    """Sampling factors."""


@dataclass
class _Tables:
    """What the segments so far have set."""

    progressive: bool = False
    arithmetic: bool = False
    width: int = 0
    height: int = 0
    components: dict[int, _Component] = field(default_factory=dict)
    first_codes: dict[int, _FirstCode] = field(default_factory=dict)
    """By table class (0x00 DC, 0x10 AC) plus number."""
    interval: int = 0


def suspicious_scans(raw: bytes) -> list[Piece]:
    """Where a JPEG that libjpeg has decoded holds long runs of zeros that flat regions explain.

    Raises:
        ImageRejectedError: nothing explains them, or bytes are lost between the segments.
    """
    found: list[Piece] = []
    if not any(zero_runs(raw, 0, len(raw))):
        return found
    tables, position = _Tables(), 2
    while True:
        marker, position = _next_marker(raw, position, strict=bool(tables.components))
        if marker == _EOI:
            return found
        if marker == _SOI or marker in _RESTARTS or marker == 0x01:
            continue
        length = int.from_bytes(raw[position : position + 2], "big")
        payload = raw[position + 2 : position + length]
        if length < 2 or len(payload) != length - 2:
            raise damaged(f"a segment of {length:,} bytes at byte {position:,} of {len(raw):,}")
        position += length
        if marker == _SOS:
            for start, end in _stretches(raw, position):
                position = end
                found += _check(raw, start, end, tables, payload)
        else:
            _read(marker, payload, tables)


def with_longer_scans(raw: bytes, pieces: list[Piece]) -> bytes:
    """The file with more data behind the pieces: its pixels are the same, unless there was too little."""
    for piece in sorted(pieces, reverse=True):
        raw = raw[: piece.end] + b"\x55" * 64 + raw[piece.end :]
    return raw


def _next_marker(raw: bytes, position: int, *, strict: bool) -> tuple[int, int]:
    """The marker at ``position``, and where what follows it begins.

    Before the frame header other bytes may lie between segments, as cameras write them; readers skip those.
    """
    match = _MARKER.search(raw, position)
    if match is None:
        raise damaged("no end marker")
    lost = raw[position : match.start()].rstrip(b"\xff")
    if strict and lost:
        raise damaged(f"{len(lost):,} bytes of no segment at byte {position:,}")
    return raw[match.end() - 1], match.end()


def _stretches(raw: bytes, position: int) -> Iterator[tuple[int, int]]:
    """The data of the scan that begins at ``position``, parted by restart markers."""
    for match in _MARKER.finditer(raw, position):
        yield position, match.start()
        if raw[match.end() - 1] not in _RESTARTS:
            return
        position = match.end()
    raise damaged("no end marker")


def _read(marker: int, payload: bytes, tables: _Tables) -> None:
    if marker in _FRAMES:
        tables.progressive, tables.arithmetic = marker in _PROGRESSIVE, marker in _ARITHMETIC
        tables.height, tables.width = struct.unpack(">HH", payload[1:5])
        for identifier, factors, _ in struct.iter_unpack("3B", payload[6 : 6 + 3 * payload[5]]):
            tables.components[identifier] = _Component(factors >> 4, factors & 15)
    elif marker == _DRI:
        tables.interval = int.from_bytes(payload[:2], "big")
    elif marker == _DHT:
        while len(payload) > 17:
            number, counts = payload[0], payload[1:17]
            symbols = payload[17 : 17 + sum(counts)]
            if len(set(symbols)) < len(symbols):
                raise damaged("a Huffman table with two codes for one symbol")
            bits = next((bits for bits, count in enumerate(counts, 1) if count), 0)
            tables.first_codes[number] = _FirstCode(bits, symbols[0] if symbols else 0)
            payload = payload[17 + len(symbols) :]
    elif marker == _DQT:
        while payload:
            size = 128 if payload[0] >> 4 else 64
            if 0 in struct.unpack(">64H" if payload[0] >> 4 else ">64B", payload[1 : 1 + size]):
                raise damaged("a quantization step of 0")
            payload = payload[1 + size :]


def _check(raw: bytes, start: int, end: int, tables: _Tables, scan: bytes) -> list[Piece]:
    """The stretch if its zeros are suspicious, and nothing if it has too few of them.

    Raises:
        ImageRejectedError: it has more than any encoder writes.
    """
    pieces = suspicious(raw, start, end)
    if not pieces:
        return []
    check_zeros(raw, start, end, _most_zeros(tables, scan))
    if tables.progressive and scan[-3] == 0 and scan[-1] >> 4:
        return []  # one bit for each DC coefficient, whatever it is: zeros do not make more of them
    data = raw[start:end].rstrip(b"\xff")  # before a marker it may be repeated
    return [pieces[0]._replace(end=start + len(data))]


def _most_zeros(tables: _Tables, scan: bytes) -> int:
    """The longest run of zeros, in bytes, that an encoder may write into this scan.

    Args:
        scan: payload of its header: components with their tables, band, approximation (B.2.3).
    """
    count = scan[0]
    chosen = [(tables.components[scan[1 + 2 * i]], scan[2 + 2 * i]) for i in range(count)]
    first, approximation = scan[1 + 2 * count], scan[3 + 2 * count]
    if tables.arithmetic:
        return SHORTEST
    units = min(_units(tables, [component for component, _ in chosen]), tables.interval or 1 << 32)
    if tables.progressive and first > 0:
        return _most_in_band(tables.first_codes.get(0x10 | chosen[0][1] & 15), units)
    bits = 0
    for component, numbers in chosen:
        blocks = component.across * component.down if count > 1 else 1
        if tables.progressive and approximation >> 4:
            bits += blocks  # one bit each
            continue
        dc = tables.first_codes.get(numbers >> 4)
        ac = _FirstCode(0, 0) if tables.progressive else tables.first_codes.get(0x10 | numbers & 15)
        if dc is None or ac is None or ac.symbol != 0:
            return SHORTEST  # zeros are coefficients of -1 or less, for ever
        if dc.symbol:  # each block is darker than the one before
            units = min(units, _LARGEST_DC // (2**dc.symbol - 1) + 1)
        bits += blocks * (dc.bits + dc.symbol + ac.bits)
    return max(SHORTEST, units * bits // 8 + 2)


def _most_in_band(ac: _FirstCode | None, blocks: int) -> int:
    """The same for a scan of AC coefficients (G.1.2.2): zeros may be ends of bands, and corrections."""
    if ac is None or ac.symbol & 15 or ac.symbol >> 4 == 15:
        return SHORTEST + _CORRECTIONS
    run = ac.symbol >> 4  # this code and as many bits stand for 2^run blocks at least
    return SHORTEST + _CORRECTIONS + (blocks >> run) * (ac.bits + run) // 8


def _units(tables: _Tables, components: list[_Component]) -> int:
    """MCUs of a scan: blocks where it has one component (A.2)."""
    across = max(component.across for component in tables.components.values())
    down = max(component.down for component in tables.components.values())
    if len(components) > 1:
        return -(-tables.width // (8 * across)) * -(-tables.height // (8 * down))
    width = -(-tables.width * components[0].across // across)
    height = -(-tables.height * components[0].down // down)
    return -(-width // 8) * -(-height // 8)
