"""What to measure on a GPU that is at hand for minutes: the most important first, each row as it is known."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator

from beit_dist.benches.measuring import Row

PARTS = ("ceilings", "trainer", "step", "resumed", "tokenize", "checkpoint", "attention")
"""Benches in the order in which they are run."""
_PEERS = ("ours, compiled", "Hugging Face, SDPA, compiled", "original", "original, tokenises")
"""The contenders that matter most, with base alone: the others cost minutes and win nothing."""
_SECONDS = 480.0
"""Nothing is begun after so many."""


def measure(quick: bool, original: str | None = None) -> Iterator[Row]:
    """Rows of all parts. One that fails is named, and the next one follows.

    Args:
        quick: small cases, for a try without a GPU.
        original: see :func:`beit_dist.benches.step.measure`.
    """
    began = time.monotonic()
    for name in PARTS:
        passed = time.monotonic() - began
        if passed > _SECONDS:
            print(f"gpu: {name}: left out, {passed:.0f} s have passed", file=sys.stderr, flush=True)
            continue
        print(f"gpu: {name}, after {passed:.0f} s", file=sys.stderr, flush=True)
        more = (
            {"original": original, "sizes": () if quick else ("base",), "names": _PEERS} if name == "step" else {}
        )
        try:
            yield from importlib.import_module(f"beit_dist.benches.{name}").measure(quick=quick, **more)
        except Exception as error:  # the others must still be measured
            print(f"gpu: {name}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
