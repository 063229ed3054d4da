"""How long something takes, and how many there are, for people."""

from __future__ import annotations

_UNITS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))


def duration(seconds: float) -> str:
    """Two significant digits in the unit that suits: ``45 s``, ``12 min``, ``3.4 h``, ``6.1 days``."""
    for unit, size in _UNITS:
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"{number:.1f} {unit}" if number < 9.95 else f"{number:,.0f} {unit}"
    return f"{seconds:.0f} s"


def counted(number: int, one: str, many: str = "") -> str:
    """``1 rank``, ``2 ranks``; ``many`` is for words whose plural is not made with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
