"""HEIC, what phones write: read where the package pillow-heif is installed, which Pillow itself does not need."""

from __future__ import annotations

import functools


@functools.cache
def heif_version() -> str | None:
    """pillow-heif's version, after which Pillow reads the format ``HEIF`` in this process; None without it."""
    try:
        import pillow_heif
    except ImportError:
        return None
    pillow_heif.register_heif_opener()
    return str(pillow_heif.__version__)
