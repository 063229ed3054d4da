"""What lies among images and is none: counted by kind, so that nothing is left out without a word."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from beit_dist.errors import DataError, printable

_MOST_KINDS = 8
"""Kinds that one line names; files numbered after a dot can have thousands."""


class Kind(NamedTuple):
    """Why something is left out."""

    one: str
    """As a person calls one of it: ``.heic``, ``hidden file``."""
    many: str
    way_out: str = ""
    """What to do to have them; empty where nobody misses them."""


class LeftOut:
    """How many of each kind were left out of a list."""

    def __init__(self) -> None:
        self.counts: Counter[Kind] = Counter()
        self._examples: dict[Kind, str] = {}

    def add(self, kind: Kind, count: int, example: str) -> None:
        """Count ``count`` more, of which one is called ``example``."""
        self.counts[kind] += count
        self._examples[kind] = min(example, self._examples.get(kind, example))

    def lines(self) -> list[str]:
        """Lines for people: one for each way out, and one for everything that nobody misses."""
        groups: defaultdict[str, list[tuple[Kind, int]]] = defaultdict(list)
        for kind, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            groups[kind.way_out].append((kind, count))
        harmless = groups.pop("", [])
        lines = [f"{self._said(kinds)}: {way_out}" for way_out, kinds in groups.items()]
        return [*lines, self._said(harmless)] if harmless else lines

    def _said(self, kinds: list[tuple[Kind, int]]) -> str:
        named = [f"{count:,} {kind.one if count == 1 else kind.many}" for kind, count in kinds[:_MOST_KINDS]]
        if rest := kinds[_MOST_KINDS:]:
            named.append(f"{sum(count for _, count in rest):,} files of {len(rest)} other kinds")
        kind = kinds[0][0]
        alone = len(kinds) == 1 and not kind.one.startswith(".")
        return f"{', '.join(named)} left out" + (f" ({printable(self._examples[kind])})" if alone else "")


def no_images(images: str, left_out: LeftOut) -> DataError:
    """The error for sources without an image; it says what they hold instead."""
    found = "; ".join(left_out.lines()) or "nothing there"
    return DataError(f"{images}: no image found: {found}")
