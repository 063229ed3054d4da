"""Images, tars and shards at URLs: the same bytes as locally, from memory and from a real store that fails."""

from __future__ import annotations

import json
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.fault_proxy import Fault, FaultProxy
from support.http_files import HttpFiles
from support.object_store import ObjectStore

from beit_dist.errors import ConfigError, DataError, StorageError, UserError
from beit_dist.images import file_bytes
from beit_dist.images.gathering import Entry
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.storage import listings
from beit_dist.storage.access import Access
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place
from beit_dist.storage.remote import RemotePlace
from beit_dist.tokenizing.commits import read_commit
from beit_dist.tokenizing.freeze import freeze
from beit_dist.tokenizing.parts import Part
from beit_dist.tokenizing.sources import SourceList, read_listed
from beit_dist.tokenizing.worker import Worker

FAULTS = [
    Fault("slow_down", chance=0.08),
    Fault("reset", chance=0.05),
    Fault("lost", method="PUT", chance=0.05),
    Fault("cut", method="GET", chance=0.08, after=100),
    Fault("whole", method="GET", chance=0.1),
]


@pytest.fixture
def memory() -> Place:
    """An empty place at a URL."""
    return open_place(f"memory://{uuid.uuid4()}/place")


@pytest.fixture
def bucket(object_store: ObjectStore, failing_store: FaultProxy) -> Place:
    """An empty folder of the store, reached through the proxy by what the environment says."""
    return open_place(f"s3://{object_store.new_bucket()}/some/place")


def upload(local: Path, place: Place) -> None:
    for path in local.rglob("*.*"):
        if path.is_file():
            place.write(path.relative_to(local).as_posix(), path.read_bytes())


def same_files(place: Place, local: Path) -> bool:
    names = [*(p.relative_to(local).as_posix() for p in local.glob("v*/*")), "manifest.json", "rejected.jsonl"]
    return all(place.read(name) == (local / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_and_shards_at_urls_give_the_bytes_of_local_ones(
    bench: Any, tmp_path: Path, memory: Place, pack_tar: Callable[[Path, Path], None], kind: str
) -> None:
    local = bench.run("local")
    if kind == "folder":
        upload(bench.images, memory / "photos")
    else:
        pack_tar(bench.images, tmp_path / "tars/photos.tar")
        upload(tmp_path / "tars", memory)
    bench.source = f"{memory}/photos" + (".tar" if kind == "tar" else "")
    out = str(memory / "shards")
    for index in (1, 2, 0):
        bench.work(out, index, 3)
    bench.finish(out)
    assert same_files(memory / "shards", local)
    assert bench.work(out)[:2] == (0, 4)


def test_a_store_that_fails_gives_the_same_bytes_and_a_restart_keeps_what_is_finished(
    bench: Any, bucket: Place, fault_proxy: FaultProxy, object_store: ObjectStore, tmp_path: Path
) -> None:
    local = bench.run("local")
    upload(bench.images, bucket / "photos")
    bench.source = f"{bucket}/photos"
    out = bucket / "shards"
    bench.job(str(out))  # freezes
    fault_proxy.inject(*FAULTS)
    honest, calls = bench.encoder, 0

    def killed(images: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:  # 4 encoder batches a shard
            raise KeyboardInterrupt
        return honest(images)

    bench.encoder = killed
    with pytest.raises(KeyboardInterrupt):
        bench.work(str(out))
    assert read_commit(out, 0) is not None
    assert not out.exists("v00/shard-000001.tar")
    first = dated(object_store, out, "v00/shard-000000.tar")
    bench.encoder = honest
    report = bench.work(str(out), decoders=1)
    assert (report.made, report.kept) == (3, 1)
    assert sum(fault_proxy.injected.values()) >= 4
    fault_proxy.inject()
    bench.finish(str(out))
    assert same_files(out, local)
    assert dated(object_store, out, "v00/shard-000000.tar") == first
    for name, _ in out.files():
        content = out.read(name)
        assert object_store.secret.encode() not in content
        assert object_store.key.encode() not in content


def dated(store: ObjectStore, place: Place, name: str) -> Any:
    bucket, _, key = f"{place}/{name}".removeprefix("s3://").partition("/")
    return store.client().head_object(Bucket=bucket, Key=key)["LastModified"]


def test_a_commit_whose_file_is_gone_or_shorter_is_made_again(bench: Any, memory: Place) -> None:
    out = memory / "shards"
    bench.work(str(out))
    bench.finish(str(out))
    before = out.read("v01/shard-000001.tar")
    out.remove("v00/shard-000000.tar")
    out.write("v01/shard-000001.tar", before[:5000])
    with pytest.raises(
        DataError, match=r"v00/shard-000000\.tar: got no such file.*v01/shard-000001\.tar: got 5000"
    ):
        bench.finish(str(out))
    assert bench.work(str(out))[:2] == (2, 2)
    bench.finish(str(out))
    assert out.read("v01/shard-000001.tar") == before
    (out / "v01").write("shard-000009.tar", b"x")
    with pytest.raises(DataError, match=r"shards that are on no list: v01/shard-000009\.tar"):
        bench.finish(str(out))


def test_an_image_that_changed_or_went_since_the_freeze_is_named(bench: Any, memory: Place) -> None:
    upload(bench.images, memory / "photos")
    bench.source = f"{memory}/photos"
    out = memory / "shards"
    bench.job(str(out))
    entry = SourceList(out, 99).read(0)[3]
    (memory / "photos").write(entry.name, b"other")
    with pytest.raises(DataError, match=r"changed since the list was frozen.*got 5 bytes"):
        read_listed(entry)
    (memory / "photos").remove(entry.name)
    with pytest.raises(DataError, match="gone since"):
        bench.work(str(out))


def test_a_remote_tar_is_scanned_without_fetching_its_images(
    tmp_path: Path, memory: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "large.tar", "w") as tar:
        for number in range(5):
            path = tmp_path / f"{number}.png"
            pixels = np.random.default_rng(number).integers(0, 256, (300, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            tar.add(path, path.name)
    raw = (tmp_path / "large.tar").read_bytes()
    memory.write("large.tar", raw)
    fetched = 0
    original = RemotePlace.read_into

    def counting(self: RemotePlace, name: str, offset: int, buffer: memoryview) -> None:
        nonlocal fetched
        fetched += len(buffer)
        original(self, name, offset, buffer)

    monkeypatch.setattr(RemotePlace, "read_into", counting)
    entries = listed(f"{memory}/large.tar")
    assert entries == listed(str(tmp_path / "large.tar"))
    assert len(entries) == 5
    assert fetched < 9 * file_bytes._WINDOW < len(raw) / 4


def test_damaged_remote_tars_are_refused(tmp_path: Path, bench: Any, memory: Place, pack_tar: Any) -> None:
    pack_tar(bench.images, tmp_path / "whole.tar")
    raw = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        middle = tar.getmembers()[5].offset
    for content, message in (
        (raw[:middle], "no closing block"),
        (raw + raw, "data after its end"),
        (b"\x1f\x8b" + raw, "compressed with gzip"),
        (b"no tar at all" * 99, "this file is none"),
    ):
        memory.write("x.tar", content)
        with pytest.raises(UserError, match=message):
            listed(f"{memory}/x.tar")
    with pytest.raises(ConfigError, match=r"missing\.tar.*not found"):
        listed(f"{memory}/missing.tar")


def test_tars_of_a_web_server_are_read(http_files: HttpFiles, bench: Any, pack_tar: Any) -> None:
    pack_tar(bench.images, http_files.root / "photos.tar")
    url = f"{http_files.url}/photos.tar"
    assert listed(url) == listed(str(http_files.root / "photos.tar"))
    bench.source = url
    out = bench.root / "out"
    bench.work(out)
    bench.finish(out)
    assert same_files(LocalPlace(out), bench.run("local", source=str(bench.images)))


def test_a_bucket_is_listed_page_by_page_and_folder_by_folder(
    bucket: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {
        f"{folder}{number}.jpg" for folder in ("", "a/", "b/", "b/c/d/", "e f/", "g+%/") for number in range(3)
    }
    for name in names:
        bucket.write(name, name.encode())
    bucket.write("b/notes.txt", b"")
    bucket.write("a/.hidden.jpg", b"")
    bucket.write("a/.snapshot/b/0.jpg", b"")
    system: Any = bucket.system()  # type: ignore[attr-defined]
    call = system.call_s3
    monkeypatch.setattr(system, "call_s3", lambda *args, **options: call(*args, MaxKeys=2, **options))
    for parallel in (1, 3, 16):
        monkeypatch.setattr(listings, "_PARALLEL", parallel)
        found = listed(f"{bucket}/")
        assert {entry.name.decode() for entry in found} == names
        assert all(entry.size == len(entry.name) for entry in found)
    assert sorted(name for name, _ in (bucket / "b").files()) == sorted(
        ["0.jpg", "1.jpg", "2.jpg", "c/d/0.jpg", "c/d/1.jpg", "c/d/2.jpg", "notes.txt"]
    )
    assert list((bucket / "nothing").files()) == []


def test_keys_of_any_kind_are_read_as_they_are_listed(bucket: Place, tmp_path: Path) -> None:
    names = [
        "/empty part.jpg",
        "a//b.jpg",
        "100%25.jpg",
        "q?x=1&y#z.jpg",
        "new\nline.jpg",
        "[a]*.jpg",
        "x/../y.jpg",
    ]
    system: Any = bucket.system()  # type: ignore[attr-defined]
    name, _, key = str(bucket).removeprefix("s3://").partition("/")
    for number, image in enumerate(names):
        system.call_s3("put_object", Bucket=name, Key=f"{key}/{image}", Body=bytes([number]))
    freeze([str(bucket)], LocalPlace(tmp_path), 0)
    read = {listed.name: read_listed(listed) for listed in SourceList(LocalPlace(tmp_path), 99).read(0)}
    assert read == {image: bytes([number]) for number, image in enumerate(names)}


def test_files_without_a_usual_suffix_are_read_at_urls_only_with_sniff(
    memory: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = b"\xff\xd8\xff" + bytes(2000)
    for name, content in {"a": photo, "b.jpg": photo, "c.jpg?w=800": photo, "d": b"other", ".e": photo}.items():
        memory.write(name, content)
    out = LocalPlace(tmp_path)
    assert freeze([str(memory)], out, 0).entries == 2
    assert "2 files without a usual suffix left out (a): --sniff recognises" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--sniff.*start over in another --out"):
        freeze([str(memory)], out, 0, sniff=True)
    assert freeze([str(memory)], out / "sniffed", 0, sniff=True).entries == 3
    assert capsys.readouterr().out == "1 file without a usual suffix, 1 hidden file left out\n"
    assert freeze([str(memory)], out / "sniffed", 0).entries == 3  # as workers give it


def test_a_store_that_is_down_is_no_fault_of_the_images(
    bench: Any, bucket: Place, fault_proxy: FaultProxy
) -> None:
    """It ends the worker with exit code 1, for another attempt; no image is rejected for it."""
    upload(bench.images, bucket / "photos")
    bench.source = f"{bucket}/photos"
    out = bench.root / "out"
    job, sources = bench.job(out)
    fault_proxy.inject(Fault("slow_down"))
    access = Access(retry_seconds=0.5)
    worker = Worker(
        Part("", LocalPlace(out), job, sources),
        bench.encoder,
        index=0,
        count=1,
        decoders=1,
        max_rejected=99,
        access=access,
    )
    with pytest.raises(StorageError, match=r"photos/class-.*storage\.retry_seconds") as raised:
        worker.run()
    assert raised.value.exit_code == 1
    assert read_commit(LocalPlace(out), 0) is None


def listed(source: str) -> list[Entry]:
    return sorted(list_images(expand_sources([source])))


def test_sources_name_urls_without_credentials(bench: Any, memory: Place) -> None:
    upload(bench.images, memory / "photos")
    bench.source = f"{memory}/photos/"
    out = memory / "shards"
    bench.job(str(out))
    header = json.loads(out.read("sources.jsonl").splitlines()[0])
    assert header["sources"] == [["folder", f"{memory}/photos"]]
