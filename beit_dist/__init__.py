"""BEiT pre-training at any scale: token shards, masked image modelling, exact resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit_dist.inference.loading import load as load

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """:func:`load`, imported when it is first asked for: the package itself loads nothing."""
    if name == "load":
        from beit_dist.inference.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "load"])
