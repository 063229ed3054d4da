"""crc32 by whatever computes it soonest; the numbers are zlib's."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32  # up to ten times as fast as what zlib 1.2 computes
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
