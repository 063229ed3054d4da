"""The scans of a JPEG: zeros in them, as a lost disk block leaves them, and scans that are missing or too short.

libjpeg draws something for any bits and only warns, which Pillow tells nobody. What the file itself tells: its
Huffman tables say what a run of zero bits means, and how long the longest is that an encoder can have written; and
its headers say how many pieces of data there are. Names and tables are those of ITU-T T.81.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from beit_dist.images.iso_boxes import number
from beit_dist.images.left_over import Piece, suspicious
from beit_dist.images.rejection import damaged
from beit_dist.images.zero_runs import SHORTEST, check_zeros, zero_runs

_MARKER = re.compile(rb"\xff[^\x00\xff]")
"""FF 00 is a byte of data, and FF may be repeated before a marker. (With ``\xff+`` it is twenty times as slow.)"""
_SOI, _EOI, _SOS, _DQT, _DHT, _DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE, _ARITHMETIC, _LOSSLESS = {0xC2, 0xCA}, {0xC9, 0xCA, 0xCB}, {0xC3, 0xCB}

_LARGEST_DC = 2048
"""DC coefficients of 8-bit samples lie in -1024 to 1023, so that a drift ends after this (F.1.2.1)."""
_CORRECTIONS = 1024 // 8
"""Bytes of correction bits that encoders hold back and then write in one piece (libjpeg: at most 1,000 bits)."""
_FILLING = random.Random(0).randbytes(512).replace(b"\xff", b"\xfe")
"""Codes of all kinds: what repeats can be without meaning in some table. (FF would be a marker.)"""


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
    lossless: bool = False
    width: int = 0
    height: int = 0
    components: dict[int, _Component] = field(default_factory=dict)
    first_codes: dict[int, _FirstCode] = field(default_factory=dict)
    """By table class (0x00 DC, 0x10 AC) plus number."""
    interval: int = 0
    unsent: dict[tuple[int, int], int] = field(default_factory=dict)
    """By component and coefficient: how many of its lowest bits are still to come, where some are."""


class _Stretch(NamedTuple):
    """Data of a scan, up to a restart marker or its end."""

    start: int
    end: int
    scan: bytes
    """Payload of the scan's header: components with their tables, band, approximation (B.2.3)."""


def suspicious_scans(raw: bytes) -> list[Piece]:
    """Where a JPEG that libjpeg has decoded holds long runs of zeros that flat regions explain.

    Raises:
        ImageRejectedError: nothing explains them, or they have taken the place of segments.
    """
    if not any(zero_runs(raw, 0, len(raw))):
        return []
    tables = _Tables()
    return [piece for stretch in _stretches(raw, tables) for piece in _check(raw, stretch, tables)]


def with_longer_scans(raw: bytes) -> bytes:
    """The file with more data at the end of every stretch: its pixels are the same, unless there was too little.

    Arithmetic codes are returned as they are: zeros at their end need not be written (D.1.8).

    Raises:
        ImageRejectedError: scans or restart intervals are missing.
    """
    tables, done = _Tables(), 0
    parts: list[bytes] = []
    for stretch in _stretches(raw, tables):
        end = stretch.start + len(raw[stretch.start : stretch.end].rstrip(b"\xff"))
        parts += [raw[done:end], _FILLING]
        done = end
    return raw if tables.arithmetic else b"".join((*parts, raw[done:]))


def check_scans(raw: bytes) -> None:
    """Check that a JPEG has all its scans, and each as many restart intervals as its header says.

    Raises:
        ImageRejectedError: some are missing.
    """
    for _ in _stretches(raw, _Tables()):
        pass


def _stretches(raw: bytes, tables: _Tables) -> Iterator[_Stretch]:
    """The data of the first picture, in order; ``tables`` is what holds for each when it comes."""
    position = 2
    while True:
        marker, position = _next_marker(raw, position, strict=bool(tables.components))
        if marker == _EOI:
            break
        if marker == _SOI or marker in _RESTARTS or marker == 0x01:
            continue
        length = number(raw, position, 2)
        payload = raw[position + 2 : position + length]
        if length < 2 or len(payload) != length - 2:
            raise damaged(f"a segment of {length:,} bytes at byte {position:,} of {len(raw):,}")
        position += length
        if marker == _SOS:
            _note(payload, tables)
            count = 0
            for start, end in _between_restarts(raw, position):
                position = end
                count += 1
                yield _Stretch(start, end, payload)
            _check_count(count, payload, tables)
        else:
            _read(marker, payload, tables)
    if tables.unsent:
        raise damaged(f"scans are missing: {len(tables.unsent)} coefficients are not complete")


def _next_marker(raw: bytes, position: int, *, strict: bool) -> tuple[int, int]:
    """The marker at ``position``, and where what follows it begins.

    Other bytes may lie between segments, as cameras write them; readers skip those. Before the frame header they
    may be zeros.
    """
    match = _MARKER.search(raw, position)
    if match is None:
        raise damaged("no end marker")
    if strict and any(zero_runs(raw, position, match.start())):
        raise damaged(f"{match.start() - position:,} bytes of no segment at byte {position:,}, with zeros in them")
    return raw[match.end() - 1], match.end()


def _between_restarts(raw: bytes, position: int) -> Iterator[tuple[int, int]]:
    """The data of the scan that begins at ``position``, parted by restart markers."""
    for match in _MARKER.finditer(raw, position):
        yield position, match.start()
        if raw[match.end() - 1] not in _RESTARTS:
            return
        position = match.end()
    raise damaged("no end marker")


def _read(marker: int, payload: bytes, tables: _Tables) -> None:
    if marker in _FRAMES:
        _read_frame(marker, payload, tables)
    elif marker == _DRI:
        tables.interval = number(payload, 0, 2)
    elif marker == _DHT:
        while len(payload) > 17:
            table, counts = payload[0], payload[1:17]
            symbols = payload[17 : 17 + sum(counts)]
            if symbols.count(0) > 1:
                raise damaged("a Huffman table with two codes for one symbol")
            bits = next((bits for bits, count in enumerate(counts, 1) if count), 0)
            tables.first_codes[table] = _FirstCode(bits, symbols[0] if symbols else 0)
            payload = payload[17 + len(symbols) :]
    elif marker == _DQT:
        while payload:
            width = 2 if payload[0] >> 4 else 1
            if any(number(payload, at, width) == 0 for at in range(1, 1 + 64 * width, width)):
                raise damaged("a quantization step of 0")
            payload = payload[1 + 64 * width :]


def _read_frame(marker: int, payload: bytes, tables: _Tables) -> None:
    if len(payload) < 6 or len(payload) < 6 + 3 * payload[5]:
        raise damaged(f"a frame header of {len(payload)} bytes, which is too short")
    tables.progressive, tables.arithmetic = marker in _PROGRESSIVE, marker in _ARITHMETIC
    tables.lossless = marker in _LOSSLESS
    tables.height, tables.width = number(payload, 1, 2), number(payload, 3, 2)
    for identifier, factors, _ in struct.iter_unpack("3B", payload[6 : 6 + 3 * payload[5]]):
        tables.components[identifier] = _Component(max(1, factors >> 4), max(1, factors & 15))
        tables.unsent |= {(identifier, coefficient): 16 for coefficient in range(64)}


def _note(scan: bytes, tables: _Tables) -> None:
    """Note which coefficients a scan sends, and how many bits of them."""
    count = scan[0] if scan else 0
    if not count or len(scan) != 4 + 2 * count:
        raise damaged(f"a scan header of {len(scan)} bytes for {count} components")
    first, last, higher, lower = scan[-3], scan[-2], scan[-1] >> 4, scan[-1] & 15
    for identifier in scan[1:-3:2]:
        if identifier not in tables.components:
            raise damaged("a scan of a component that the frame header does not name")
        if not tables.progressive:
            for coefficient in range(64):
                tables.unsent.pop((identifier, coefficient), None)
            continue
        for key in ((identifier, coefficient) for coefficient in range(first, last + 1)):
            if higher and tables.unsent.get(key) != higher:
                raise damaged(f"scans are missing before the one that refines coefficient {key[1]}")
            tables.unsent[key] = lower
            if not lower:
                del tables.unsent[key]


def _check_count(count: int, scan: bytes, tables: _Tables) -> None:
    if not tables.interval:
        return
    expected = -(
        -_units(tables, [tables.components[identifier] for identifier in scan[1:-3:2]]) // tables.interval
    )
    if count < expected:
        raise damaged(f"{count:,} restart intervals in a scan of {expected:,}")


def _check(raw: bytes, stretch: _Stretch, tables: _Tables) -> list[Piece]:
    """The stretch if its zeros are suspicious, and nothing if it has too few of them.

    Raises:
        ImageRejectedError: it has more than any encoder writes.
    """
    start, end, scan = stretch
    pieces = suspicious(raw, start, end)
    if not pieces:
        return []
    check_zeros(raw, start, end, _most_zeros(tables, scan))
    if tables.progressive and scan[-3] == 0 and scan[-1] >> 4:
        return []  # one bit for each DC coefficient, whatever it is: zeros do not make more of them
    data = raw[start:end].rstrip(b"\xff")  # before a marker it may be repeated
    return [pieces[0]._replace(end=start + len(data))]


def _most_zeros(tables: _Tables, scan: bytes) -> int:
    """The longest run of zeros, in bytes, that an encoder may write into this scan."""
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
        no_ac = tables.progressive or tables.lossless
        ac = _FirstCode(0, 0) if no_ac else tables.first_codes.get(0x10 | numbers & 15)
        if dc is None or ac is None or ac.symbol != 0:
            return SHORTEST  # zeros are coefficients of -1 or less, for ever
        if dc.symbol and not tables.lossless:  # each block is darker than the one before
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
    """MCUs of a scan: blocks where it has one component, and samples for blocks where it is lossless (A.2)."""
    side = 1 if tables.lossless else 8
    across = max(component.across for component in tables.components.values())
    down = max(component.down for component in tables.components.values())
    if len(components) > 1:
        return -(-tables.width // (side * across)) * -(-tables.height // (side * down))
    width = -(-tables.width * components[0].across // across)
    height = -(-tables.height * components[0].down // down)
    return -(-width // side) * -(-height // side)
