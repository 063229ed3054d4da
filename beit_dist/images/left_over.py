"""Tell zeros that an encoder wrote for a flat region from zeros that took the place of its data.

Both decode to a flat region. But a block of zeros makes much more of it than the data it replaced, so that the
picture is full before the data ends, and what is left over is not drawn. Whether it is drawn can be tried: other
bytes in its place give other pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from beit_dist.images.rejection import damaged
from beit_dist.images.zero_runs import SHORTEST, ZeroRun, zero_runs

_OTHER_BYTES = b"\x55\xcc\xee\x0f"
"""Each is tried until one shows: bits may mean nothing, or whiter than white. (FF would be a marker.)"""
_TRIED = 6
"""Bytes at the end of a piece: many codes, and far fewer than what is left over."""


class Piece(NamedTuple):
    """Coded data that is read from its first byte to its last, and holds zeros that may be right."""

    start: int
    end: int
    zeros: ZeroRun
    """The longest run."""


def suspicious(raw: bytes, start: int, end: int, at_end: int = SHORTEST + 1) -> list[Piece]:
    """The piece ``raw[start:end]``, if it holds a long run of zeros, or ends with ``at_end`` of them."""
    runs = list(zero_runs(raw, start, end))
    if not runs and end - start >= at_end and not any(raw[end - at_end : end]):
        first = start + len(raw[start:end].rstrip(b"\0"))
        runs = [ZeroRun(first, end - first)]
    return [Piece(start, end, max(runs, key=lambda run: run.length))] if runs else []


def check_drawn(raw: bytes, pieces: Sequence[Piece], pixels: bytes, decode: Callable[[bytes], bytes]) -> None:
    """Check that the ends of the pieces are part of the picture. Costs a few decodings for each.

    Args:
        pixels: what ``decode(raw)`` gives. Its errors count as other pixels.

    Raises:
        ImageRejectedError: data is left over.
    """

    def shows(start: int) -> bool:
        start += raw[start - 1] == 0xFF  # in a JPEG, the zero behind it belongs to it
        return any(
            _pixels(raw[:start] + bytes([other]) * _TRIED + raw[start + _TRIED :], decode) != pixels
            for other in _OTHER_BYTES
        )

    for piece in pieces:
        # Where nothing shows even among the zeros, the picture is of one colour and has nothing to lose.
        if shows(piece.zeros.start) and not shows(piece.end - _TRIED - 1):
            run = piece.zeros
            full = f"the picture is full before byte {piece.end:,}"
            raise damaged(f"{run.length:,} zero bytes at byte {run.start:,}, and {full}")


def _pixels(raw: bytes, decode: Callable[[bytes], bytes]) -> bytes | None:
    try:
        return decode(raw)
    except MemoryError:
        raise
    except Exception:  # decoders let errors of any type through for damaged files
        return None
