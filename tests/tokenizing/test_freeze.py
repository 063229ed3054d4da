"""The frozen list: every image once, in an order that the seed decides, from folders and tars alike."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from beit_dist.errors import ConfigError, DataError, SampleError
from beit_dist.images import file_bytes as image_bytes
from beit_dist.images.listing import expand_sources
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.storage.remote import RemotePlace
from beit_dist.tokenizing.freeze import freeze
from beit_dist.tokenizing.sources import SourceList, read_listed

Pack = Callable[[Path, Path], None]


def names(out: Path, shard_samples: int = 5) -> list[str]:
    sources = SourceList(LocalPlace(out), shard_samples)
    return [entry.name for shard in range(sources.shards) for entry in sources.read(shard)]


def touch(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_folders_and_tars_are_searched_through_and_only_images_are_taken(tmp_path: Path, pack_tar: Pack) -> None:
    for name in ("b.JPG", "a/c.jpeg", "a/d/e.Png", "z.webp"):
        touch(tmp_path / "in" / name)
    for name in (
        "notes.txt",
        "._b.jpg",
        ".hidden/x.jpg.txt",
        ".snapshot/b.JPG",
        "a/.thumbs/c/x.png",
        "jpg",
        "labels.csv",
    ):
        touch(tmp_path / "in" / name)
    pack_tar(tmp_path / "in", tmp_path / "in.tar")
    for number, source in enumerate(("in", "in.tar")):
        out = tmp_path / f"out{number}"
        header = freeze([str(tmp_path / source)], LocalPlace(out), 0)
        assert header.entries == 4
        assert sorted(names(out)) == ["a/c.jpeg", "a/d/e.Png", "b.JPG", "z.webp"]


def test_the_order_is_a_permutation_by_the_seed_and_the_same_every_time(tmp_path: Path) -> None:
    for number in range(50):
        touch(tmp_path / "in" / f"{number}.jpg")
    lists = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        freeze([str(tmp_path / "in")], LocalPlace(tmp_path / out), seed)
        lists.append(names(tmp_path / out))
    assert lists[0] == lists[1]
    assert lists[0] != lists[2]
    assert sorted(lists[0]) == sorted(lists[2])
    assert lists[0] != sorted(lists[0])
    assert (tmp_path / "a/sources.jsonl").read_bytes() == (tmp_path / "b/sources.jsonl").read_bytes()


def test_a_tar_gives_the_same_list_as_its_folder(tmp_path: Path, bench: Any, pack_tar: Pack) -> None:
    pack_tar(bench.images, tmp_path / "images.tar")
    freeze([str(bench.images)], LocalPlace(tmp_path / "a"), 0)
    freeze([str(tmp_path / "images.tar")], LocalPlace(tmp_path / "b"), 0)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for one, two in zip(
        SourceList(LocalPlace(tmp_path / "a"), 99).read(0),
        SourceList(LocalPlace(tmp_path / "b"), 99).read(0),
        strict=True,
    ):
        assert (one.sample_id, one.label) == (two.sample_id, two.label)
        assert read_listed(one) == read_listed(two) == (bench.images / one.name).read_bytes()


def test_several_tars_by_braces_and_several_sources(tmp_path: Path, bench: Any, pack_tar: Pack) -> None:
    for number in range(3):
        pack_tar(bench.images / f"class-{number}", tmp_path / f"part-{number}.tar")
    header = freeze([str(tmp_path / "part-{0..2}.tar")], LocalPlace(tmp_path / "out"), 0)
    assert header.entries == 13
    assert [os.path.basename(source.path) for source in header.sources] == [
        "part-0.tar",
        "part-1.tar",
        "part-2.tar",
    ]
    both = freeze([str(bench.images / "class-0"), str(tmp_path / "part-1.tar")], LocalPlace(tmp_path / "two"), 0)
    assert [source.kind for source in both.sources] == ["folder", "tar"]


def test_class_folders_become_labels_and_anything_else_does_not(tmp_path: Path, bench: Any) -> None:
    assert freeze([str(bench.images)], LocalPlace(tmp_path / "a"), 0).labels
    for entry in SourceList(LocalPlace(tmp_path / "a"), 99).read(0):
        assert entry.label == entry.name.split("/")[0]
    assert not freeze([str(bench.images / "class-0")], LocalPlace(tmp_path / "b"), 0).labels
    assert SourceList(LocalPlace(tmp_path / "b"), 99).read(0)[0].label is None
    touch(bench.images / "stray.png")
    assert not freeze([str(bench.images)], LocalPlace(tmp_path / "c"), 0).labels


def test_names_that_are_no_utf8_survive(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    with open(folder + b"/\xff\xfe.jpg", "wb") as file:
        file.write(b"content")
    freeze([str(tmp_path / "in")], LocalPlace(tmp_path / "out"), 0)
    (entry,) = SourceList(LocalPlace(tmp_path / "out"), 4).read(0)
    assert read_listed(entry) == b"content"


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/a.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    freeze([str(tmp_path / "in")], LocalPlace(tmp_path / "out"), 0)
    assert names(tmp_path / "out") == ["link/a.jpg"]


def test_a_list_is_kept_and_one_of_other_sources_or_seed_is_refused(tmp_path: Path, bench: Any) -> None:
    out = tmp_path / "out"
    freeze([str(bench.images)], LocalPlace(out), 0)
    before = (out / "sources.jsonl").read_bytes()
    touch(bench.images / "class-0/new.png")
    freeze([str(bench.images)], LocalPlace(out), 0)
    assert (out / "sources.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="--seed: got 1, expected 0"):
        freeze([str(bench.images)], LocalPlace(out), 1)
    with pytest.raises(ConfigError, match="--images"):
        freeze([str(bench.images / "class-0")], LocalPlace(out), 0)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar"])
def test_a_compressed_tar_is_refused_with_the_way_out(
    tmp_path: Path, bench: Any, pack_tar: Pack, suffix: str
) -> None:
    pack_tar(bench.images, tmp_path / "x.tar")
    packed = tmp_path / f"y{suffix}"
    packed.write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    with pytest.raises(DataError, match=r"compressed with gzip.*tar -xf"):
        expand_sources([str(packed)])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("s3://key:secret@bucket/x.tar", "without user, password"),
        ("s3://bucket/x.tar.gz", "a plain .tar"),
        ("https://host/images", "a web server lists no folders"),
        ("pipe:cat x.tar", "pipe: is not supported"),
        ("nowhere.tar", "No such file"),
        ("${NO_SUCH_NAME}/x.tar", "NO_SUCH_NAME"),
        ("x-{000..009.tar", "braces in pairs"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_sources([spec])


def test_a_file_that_is_no_tar_or_a_source_given_twice_is_refused(tmp_path: Path, bench: Any) -> None:
    touch(tmp_path / "x.jpg", b"x" * 2000)
    with pytest.raises(ConfigError, match="this file is none"):
        expand_sources([str(tmp_path / "x.jpg")])
    with pytest.raises(ConfigError, match="once"):
        expand_sources([str(bench.images), str(bench.images) + "/"])


@pytest.mark.parametrize(
    ("out", "seed", "message"),
    [
        ("https://host/shards", 0, "Nothing can be written to a web server"),
        ("github://owner/shards", 0, r"storage\.options\.github.*repo"),
        ("out", -1, "--seed"),
        ("out", 2**63, "--seed"),
    ],
)
def test_what_cannot_become_a_list_is_refused_before_images_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, seed: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RemotePlace, "exists", lambda place, name: place.system() is None)
    (tmp_path / "in").mkdir()  # looked through, it would give another error
    with pytest.raises(ConfigError, match=message):
        freeze(["in"], open_place(out), seed)


def test_no_image_at_all_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "in/readme.txt")
    with pytest.raises(DataError, match="no image found"):
        freeze([str(tmp_path / "in")], LocalPlace(tmp_path / "out"), 0)
    assert not (tmp_path / "out/sources.jsonl").exists()


def test_cut_damaged_and_joined_tars_are_refused(tmp_path: Path, bench: Any, pack_tar: Pack) -> None:
    pack_tar(bench.images, tmp_path / "whole.tar")
    raw = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = tar.getmembers()
    middle = members[len(members) // 2]
    damaged = bytearray(raw)
    damaged[middle.offset + 100] ^= 1
    cuts = {
        "at a member": raw[: middle.offset],
        "in a header": raw[: middle.offset + 100],
        "in the data": raw[: middle.offset_data + 100],
        "a damaged header": bytes(damaged),
        "joined": raw + raw,
    }
    for name, content in cuts.items():
        (tmp_path / "cut.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"cut\.tar: "):
            freeze([str(tmp_path / "cut.tar")], LocalPlace(tmp_path / name), 0)


def test_a_class_name_too_long_for_the_json_is_refused_before_the_work(tmp_path: Path) -> None:
    touch(tmp_path / "in" / ("\x01" * 100) / "a.jpg")
    touch(tmp_path / "in/b/a.jpg")
    with pytest.raises(DataError, match="label"):
        freeze([str(tmp_path / "in")], LocalPlace(tmp_path / "out"), 0)


def test_a_changed_or_missing_image_is_noticed_when_read(tmp_path: Path, bench: Any, pack_tar: Pack) -> None:
    freeze([str(bench.images)], LocalPlace(tmp_path / "a"), 0)
    entry = SourceList(LocalPlace(tmp_path / "a"), 99).read(0)[0]
    path = Path(entry.place)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="changed since the list was frozen"):
        read_listed(entry)
    path.unlink()
    with pytest.raises(DataError, match="gone since"):
        read_listed(entry)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_tar_written_anew_is_noticed_though_it_is_as_long(
    tmp_path: Path, bench: Any, pack_tar: Pack, where: str
) -> None:
    """What lies at the old positions would be rejected as damaged images, or be taken for others."""
    tar = tmp_path / "images.tar"
    pack_tar(bench.images, tar)
    place = open_place(tmp_path if where == "local" else f"memory://{uuid.uuid4()}/images")
    place.write(tar.name, tar.read_bytes())
    freeze([f"{place}/{tar.name}"], LocalPlace(tmp_path / "out"), 0)
    entries = SourceList(LocalPlace(tmp_path / "out"), 99).read(0)
    with tarfile.open(tar) as old, io.BytesIO() as written, tarfile.open(fileobj=written, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.size):
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
        new.close()
        anew = written.getvalue()
    assert len(anew) == tar.stat().st_size
    image_bytes._descriptor.cache_clear()
    place.write(tar.name, anew)
    with pytest.raises(DataError, match=r"changed since.*no image of \d+ bytes at byte \d+"):
        list(map(read_listed, entries))


@pytest.mark.parametrize("size", ["-100000", str(10**30), str(2**63 - 513)])
@pytest.mark.parametrize("before", [0, 1])
def test_impossible_sizes_in_tars_are_damage(tmp_path: Path, size: str, before: int) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(before):
            tar.addfile(tarfile.TarInfo(f"{number}.jpg"))
        member = tarfile.TarInfo("x.jpg")
        member.pax_headers = {"size": size}
        tar.addfile(member)
    with pytest.raises(DataError, match=r"x\.tar: damaged or cut short"):
        freeze([str(tmp_path / "x.tar")], LocalPlace(tmp_path / "out"), 0)


def test_links_in_tars_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            tar.addfile(member)
        folder = tarfile.TarInfo("d.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    freeze([str(tmp_path / "x.tar")], LocalPlace(tmp_path / "out"), 0)
    assert names(tmp_path / "out") == ["a.jpg"]
    assert "2 links in tars left out (b.jpg): pack the files that they lead to" in capsys.readouterr().out


def test_long_and_odd_names_in_tars_are_read(tmp_path: Path) -> None:
    content = {"n" * 150 + ".jpg": b"long", "b\u00e9.jpg": b"accent", "d/" * 90 + "deep.jpg": b"deep"}
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
            for name, raw in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
        out = LocalPlace(tmp_path / f"out-{kind}")
        image_bytes._descriptor.cache_clear()
        freeze([str(tmp_path / "x.tar")], out, 0)
        assert {entry.name: read_listed(entry) for entry in SourceList(out, 9).read(0)} == content


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("records", [{}, {"comment": "x" * 2000}])
def test_sizes_that_stand_in_pax_headers_alone_are_believed(
    tmp_path: Path, where: str, records: dict[str, str]
) -> None:
    """The fields of the plain headers say 0, as where a size does not fit into them."""
    content = {"a.jpg": b"a" * 700, "b.jpg": b"b" * 1300}
    written = io.BytesIO()
    for name, raw in content.items():
        member = tarfile.TarInfo(name)
        member.size, member.pax_headers = len(raw), {**records, "size": str(len(raw))}
        headers = bytearray(member.tobuf(tarfile.PAX_FORMAT))
        member.size, member.pax_headers = 0, {}
        headers[-tarfile.BLOCKSIZE :] = member.tobuf(tarfile.USTAR_FORMAT)
        written.write(headers + raw + bytes(-len(raw) % tarfile.BLOCKSIZE))
    written.write(bytes(10240))
    place = open_place(tmp_path if where == "local" else f"memory://{uuid.uuid4()}/images")
    place.write("x.tar", written.getvalue())
    out = LocalPlace(tmp_path / "out")
    image_bytes._descriptor.cache_clear()
    freeze([f"{place}/x.tar"], out, 0)
    entries = SourceList(out, 9).read(0)
    assert {entry.name: read_listed(entry) for entry in entries} == content
    image_bytes._descriptor.cache_clear()
    place.write("x.tar", written.getvalue().replace(b"=700\n", b"=699\n"))
    with pytest.raises(DataError, match="changed since the list was frozen"):
        list(map(read_listed, entries))


def test_a_damaged_list_is_refused(tmp_path: Path, bench: Any) -> None:
    freeze([str(bench.images)], LocalPlace(tmp_path), 0)
    lines = (tmp_path / "sources.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "sources.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(DataError, match="got 12 entries, expected 13"):
        SourceList(LocalPlace(tmp_path), 4)
    (tmp_path / "sources.jsonl").write_bytes(b"".join([lines[0], b"{}\n", *lines[2:]]))
    with pytest.raises(DataError, match="entry 0 is damaged"):
        SourceList(LocalPlace(tmp_path), 4).read(0)
    (tmp_path / "sources.jsonl").write_text(json.dumps({"format": "x"}) + "\n")
    with pytest.raises(DataError, match="another kind of file"):
        SourceList(LocalPlace(tmp_path), 4)
    with pytest.raises(DataError, match="--index-only"):
        SourceList(LocalPlace(tmp_path / "empty"), 4)


def test_folders_and_links_named_like_images(tmp_path: Path) -> None:
    touch(tmp_path / "in/x.jpg/inner.png")
    touch(tmp_path / "in/empty.jpg", b"")
    (tmp_path / "in/dead.txt").symlink_to("nowhere")
    freeze([str(tmp_path / "in")], LocalPlace(tmp_path / "out"), 0)
    assert sorted(names(tmp_path / "out")) == ["empty.jpg", "x.jpg/inner.png"]


@pytest.mark.parametrize("kind", ["loop", "dead link", "pipe"])
def test_what_is_named_like_an_image_and_is_none_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "in/odd.jpg"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    with pytest.raises(DataError, match=r"in/odd\.jpg: .*[Rr]emove (or rename )?it"):
        freeze([str(tmp_path / "in")], LocalPlace(tmp_path / "out"), 0)


def test_an_image_that_may_not_be_read_ends_the_worker_with_its_name(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no reject: on another machine, or after a chmod, it would be one of the samples."""
    freeze([str(bench.images)], LocalPlace(tmp_path), 0)
    entry = SourceList(LocalPlace(tmp_path), 99).read(0)[0]

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(SampleError, match=r"\.png cannot be read \(Permission denied\)"):
        read_listed(entry)


def test_threads_that_open_a_tar_at_once_do_not_close_it_for_one_another(
    tmp_path: Path, bench: Any, pack_tar: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_tar(bench.images, tmp_path / "images.tar")
    freeze([str(tmp_path / "images.tar")], LocalPlace(tmp_path / "out"), 0)
    entries = SourceList(LocalPlace(tmp_path / "out"), 99).read(0)
    opened, read = os.open, os.pread
    together = threading.Barrier(2)

    def slow_open(*arguments: Any) -> int:
        together.wait(60)  # both have missed the cache
        return opened(*arguments)

    def slow_read(*arguments: Any) -> bytes:
        together.wait(60)  # whatever is to be closed is closed
        return read(*arguments)

    image_bytes._descriptor.cache_clear()
    monkeypatch.setattr(os, "open", slow_open)
    monkeypatch.setattr(os, "pread", slow_read)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read_listed, entries[:2]))
    assert found == [(bench.images / entry.name).read_bytes() for entry in entries[:2]]
