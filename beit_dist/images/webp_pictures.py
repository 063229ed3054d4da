"""Where the coded data of a WebP lies (RFC 9649 for its chunks; RFC 6386, 9.2 to 9.6, for VP8's partitions)."""

from __future__ import annotations

from collections.abc import Iterator

_ALPHA_CODED = 1
"""ALPH's compression method (RFC 9649, 2.7.1.2); stored as it is, zeros are transparent pixels."""
_KEY_FRAME_HEADER = 10


def coded_parts(raw: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each piece of coded data: of pictures, their alpha, and frames; VP8's partitions apart."""
    yield from _parts(raw, 12, len(raw))


def _parts(raw: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start + 8 <= end:
        kind, length = raw[start : start + 4], _number(raw, start + 4, 4)
        start += 8
        last = min(start + length, end)
        if kind == b"VP8L":
            yield start, last
        elif kind == b"ALPH" and raw[start : start + 1] and raw[start] & 3 == _ALPHA_CODED:
            yield start + 1, last
        elif kind == b"VP8 ":
            yield from _partitions(raw, start, last)
        elif kind == b"ANMF":
            yield from _parts(raw, start + 16, last)
        start += length + length % 2


def _partitions(raw: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The modes, and each partition of coefficients; their sizes stand between, but for the last one's."""
    first = start + _KEY_FRAME_HEADER
    table = first + (_number(raw, start, 3) >> 5)
    yield first, min(table, end)
    count = 1 << _partitions_log2(raw[first : min(table, end)])
    at = table + 3 * (count - 1)
    for number in range(count):
        last = end if number == count - 1 else min(at + _number(raw, table + 3 * number, 3), end)
        if at < last:
            yield at, last
        at = last


def _partitions_log2(modes: bytes) -> int:
    """What the frame header says, behind its settings of segments and of the loop filter."""
    bits = _Bits(modes)
    bits.take(2)  # colour space, clamping
    if bits.take(1):
        update_map, update_data = bits.take(1), bits.take(1)
        if update_data:
            bits.take(1)
            for size in (7, 7, 7, 7, 6, 6, 6, 6):
                if bits.take(1):
                    bits.take(size + 1)  # and a sign
        if update_map:
            for _ in range(3):
                if bits.take(1):
                    bits.take(8)
    bits.take(10)  # filter's type, level and sharpness
    if bits.take(1) and bits.take(1):
        for _ in range(8):
            if bits.take(1):
                bits.take(7)
    return bits.take(2)


class _Bits:
    """Bits that are as often 1 as 0, from a boolean coder (RFC 6386, 7.3)."""

    def __init__(self, coded: bytes) -> None:
        self._coded, self._at = coded, 2
        self._value = int.from_bytes(coded[:2].ljust(2, b"\0"), "big")
        self._range, self._shifted = 255, 0

    def take(self, count: int) -> int:
        """The next ``count`` bits, the highest first."""
        found = 0
        for _ in range(count):
            split = 1 + ((self._range - 1) * 128 >> 8)
            bit = self._value >= split << 8
            if bit:
                self._value -= split << 8
            self._range = self._range - split if bit else split
            while self._range < 128:
                self._value, self._range, self._shifted = self._value << 1, self._range << 1, self._shifted + 1
                if self._shifted == 8:
                    self._value |= self._coded[self._at] if self._at < len(self._coded) else 0
                    self._at, self._shifted = self._at + 1, 0
            found = found << 1 | bit
        return found


def _number(raw: bytes, at: int, size: int) -> int:
    return int.from_bytes(raw[at : at + size], "little")
