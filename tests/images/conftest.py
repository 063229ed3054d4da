"""A place for the archives of a test, here and at a URL."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from beit_dist.images import file_bytes
from beit_dist.storage.opening import open_place


@pytest.fixture(params=["here", "at a URL"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, bytes], str]:
    """Writes a file and tells its path or URL."""
    place = open_place(tmp_path if request.param == "here" else f"memory://{uuid.uuid4()}/in")

    def write(name: str, content: bytes) -> str:
        file_bytes._descriptor.cache_clear()
        place.write(name, content)
        return f"{place}/{name}"

    return write
