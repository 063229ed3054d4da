"""Uploads in parts: side by side, in bounded memory, whole or not at all, and nothing left behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support.fault_proxy import FaultProxy
from support.object_store import ObjectStore

from beit_dist.storage import uploads
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place

CONTENT = bytes(range(256)) * 70_000  # 17.9 MB
SIZE = 5 << 20  # the least that a part may have


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    return object_store.new_bucket()


@pytest.fixture
def place(bucket: str, failing_store: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(uploads, "_PART", SIZE)
    return open_place(f"s3://{bucket}/some/place")


def intercepted(place: Any, monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    """Have ``before(method, settings)`` called before each request."""
    system = place.system()
    original = system.call_s3

    def call(method: str, **settings: Any) -> Any:
        before(method, settings)
        return original(method, **settings)

    monkeypatch.setattr(system, "call_s3", call)


def test_parts_are_under_way_side_by_side_and_no_more_than_may_be(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, together = threading.Lock(), threading.Barrier(uploads._AT_ONCE)
    sizes: list[int] = []

    def before(method: str, settings: dict[str, Any]) -> None:
        if method == "upload_part":
            with lock:
                sizes.append(len(settings["Body"]))
                first = len(sizes) <= uploads._AT_ONCE
            if first:
                together.wait(60)  # breaks unless so many are under way at once

    intercepted(place, monkeypatch, before)
    with place.writing("large") as file:
        for start in range(0, len(CONTENT), 3_000_000):
            file.write(CONTENT[start : start + 3_000_000])
            assert file.tell() == min(len(CONTENT), start + 3_000_000)
    assert sorted(sizes) == [len(CONTENT) % SIZE, *[SIZE] * (len(CONTENT) // SIZE)]
    assert b"".join(map(bytes, place.chunks("large"))) == CONTENT


def test_small_and_empty_files_are_one_request(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    intercepted(place, monkeypatch, lambda method, _: asked.append(method))
    for name, content in (("empty", b""), ("small", b"content")):
        with place.writing(name) as file:
            file.write(content)
        assert place.read(name) == content
    assert asked == ["put_object"] * 2


@pytest.mark.parametrize("failure", ["of the writer", "of a part"])
def test_an_upload_that_fails_leaves_neither_file_nor_parts(
    place: Place, bucket: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    def before(method: str, settings: dict[str, Any]) -> None:
        if failure == "of a part" and settings.get("PartNumber") == 2:
            raise RuntimeError(failure)

    def write() -> None:
        with place.writing("half") as file:
            file.write(CONTENT)
            if failure == "of the writer":
                raise RuntimeError(failure)

    intercepted(place, monkeypatch, before)
    with pytest.raises(RuntimeError, match=failure):
        write()
    assert not place.exists("half")
    assert not object_store.client().list_multipart_uploads(Bucket=bucket).get("Uploads")
