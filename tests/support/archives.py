"""Images as archives hold them, made from names and bytes; and how many bytes of URLs are fetched."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_dist.images.files import find_images
from beit_dist.storage.access import Access
from beit_dist.storage.remote import RemotePlace

ACCESS = Access()


def picture(number: int) -> bytes:
    """A small JPEG or PNG, different for each number."""
    raw = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(raw, "PNG" if number % 2 else "JPEG")
    return raw.getvalue()


IMAGES = {f"class-{number % 3}/{number:02d}.jpg": picture(number) for number in range(7)}


def tar_of(files: Mapping[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def tar_of_tars(files: Mapping[str, bytes]) -> bytes:
    folders = sorted({os.path.dirname(name) for name in files}, reverse=True)
    inner = {
        f"{folder}.tar": tar_of({n.partition("/")[2]: raw for n, raw in files.items() if n.startswith(folder)})
        for folder in folders
    }
    return tar_of(inner)


def zip_of(files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return raw.getvalue()


def deflated(files: Mapping[str, bytes]) -> bytes:
    return zip_of(files, zipfile.ZIP_DEFLATED)


def streamed(files: Mapping[str, bytes]) -> bytes:
    """As a zip is written to a pipe: sizes and checksums follow the data."""
    raw = io.BytesIO()
    raw.seekable = lambda: False  # type: ignore[method-assign]
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return raw.getvalue()


def found(*images: str) -> dict[str, bytes]:
    """Names and bytes, in the order of the list."""
    return {file.name: file.read(ACCESS) for file in find_images(images)}


def count_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many bytes have been fetched from URLs since."""
    sizes: list[int] = []
    original = RemotePlace.read_range

    def counting(self: RemotePlace, name: str, offset: int, size: int) -> Any:
        sizes.append(size)
        return original(self, name, offset, size)

    monkeypatch.setattr(RemotePlace, "read_range", counting)
    return lambda: sum(sizes)


Rows = list[dict[str, Any]]


def rows_of(files: Mapping[str, bytes]) -> Rows:
    return [
        {"image": {"bytes": raw, "path": os.path.basename(name)}, "label": int(name[6])}
        for name, raw in files.items()
    ]


def parquet_of(rows: Rows, group: int = 3, names: list[str] | None = None, **options: Any) -> bytes:
    """As ``datasets`` writes it; with ``names``, those of the classes are in its metadata."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'beit_dist[parquet]'")
    import pyarrow.parquet as parquet

    table = pyarrow.Table.from_pylist(rows)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    raw = io.BytesIO()
    parquet.write_table(table, raw, row_group_size=group, **options)
    return raw.getvalue()
