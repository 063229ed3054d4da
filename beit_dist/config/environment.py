"""Numbers that launchers, schedulers and users set in the environment: read strictly, refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from beit_dist.errors import ConfigError

_DIGITS = re.compile(r"[0-9]{1,18}")


def number(
    environment: Mapping[str, str], name: str, low: int = 0, high: int | None = None, way_out: str = ""
) -> int | None:
    """The whole number in a variable; None if it is not set or empty.

    Args:
        low: the smallest number accepted.
        high: the largest number accepted; None for no limit.
        way_out: what to change, if there is more to say than the range.

    Raises:
        ConfigError: it is not a number, or it is out of range.
    """
    text = environment.get(name, "").strip()
    if not text:
        return None
    if _DIGITS.fullmatch(text) and low <= int(text) and (high is None or int(text) <= high):
        return int(text)
    if text.startswith(("tcp://", "udp://")):
        way_out = (
            "Kubernetes sets this variable for a Service whose name matches. Set enableServiceLinks: false in the "
            "pod's spec, or rename the Service."
        )
    expected = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"
    raise ConfigError(name, text, expected, way_out)
