"""Images that are in no shard: why, how many may be, and a summary for people."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from beit_dist.config.reading import exact
from beit_dist.errors import ConfigError, DataError, printable

REJECTED_NAME = "rejected.jsonl"
_EXAMPLES = 3


class Rejected(NamedTuple):
    """An image that is in no shard, and why."""

    id: int
    name: str
    reason: str
    kind: str = "other"
    """The reason's class; see :data:`beit_dist.images.decoding.RejectKind`."""

    def to_line(self) -> bytes:
        """Its line of ``rejected.jsonl``."""
        return (json.dumps(self._asdict()) + "\n").encode()


def rejection_limit(text: str, entries: int) -> int:
    """How many images may be rejected: a number, or a percentage of the list such as ``1%``.

    Raises:
        ConfigError: it is neither.
    """
    try:
        limit = exact(float(text[:-1])) / 100 * entries if text.endswith("%") else int(text)
    except ValueError:
        limit = -1
    if limit < 0:
        raise ConfigError("--max-rejected", text, "a number of images, or a percentage such as 1%")
    return int(min(limit, entries))


def check_rejected(rejected: int, limit: int, examples: Sequence[Rejected]) -> None:
    """Fail the job past the limit.

    Raises:
        DataError: tells some of the reasons.
    """
    if rejected > limit:
        listed = "".join(f"\n  {printable(entry.name)}: {entry.reason}" for entry in examples[:5])
        raise DataError(
            f"{rejected} images rejected, more than the {limit} that --max-rejected allows. Repair or remove "
            f"them, or raise the limit; finished shards are kept. Some of them:{listed}"
        )


def summary(rejected: Iterable[Rejected]) -> list[str]:
    """Lines for people: how many of each class, most first, with a few examples; empty if there are none."""
    kinds: dict[str, list[Rejected]] = defaultdict(list)
    for entry in rejected:
        kinds[entry.kind].append(entry)
    lines = []
    for kind, entries in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"rejected, {kind.replace('_', ' ')}: {len(entries)}")
        lines += [f"  {printable(entry.name)}: {entry.reason}" for entry in entries[:_EXAMPLES]]
        if len(entries) > _EXAMPLES:
            lines.append("  ...")
    return lines
