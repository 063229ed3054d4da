"""Every kind of source: what it lists, in what order and under what names, what it reads, and what it refuses."""

from __future__ import annotations

import io
import os
import struct
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.archives import (
    ACCESS,
    IMAGES,
    count_bytes,
    deflated,
    found,
    picture,
    streamed,
    tar_of,
    tar_of_tars,
    zip_of,
)

from beit_dist.errors import ConfigError, DataError
from beit_dist.images import file_bytes
from beit_dist.images.files import find_images, images_digest
from beit_dist.images.left_out import LeftOut
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.images.sources.table import EXPECTED, FILES, SOURCES, source_of
from beit_dist.storage.opening import open_place

archives = pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".tar", tar_of),
        (".tar", tar_of_tars),
        (".zip", zip_of),
        (".zip", deflated),
        (".zip", streamed),
    ],
    ids=["tar", "tar of tars", "zip", "deflated zip", "streamed zip"],
)
Pack = Callable[[Mapping[str, bytes]], bytes]


def test_every_kind_has_a_name_and_positions_of_its_own_and_is_rebuilt_from_them() -> None:
    assert len({kind.kind for kind in SOURCES}) == len(SOURCES)
    assert len({suffix for kind in FILES for suffix in kind.suffixes}) == sum(len(kind.suffixes) for kind in FILES)
    for kind in SOURCES:
        assert source_of(kind.kind, "/x") == kind("/x")
        assert not {"name", "source", "bytes", "label"} & set(kind.position)


@archives
def test_an_archive_lists_and_reads_what_its_folder_holds(
    tmp_path: Path, put: Callable[[str, bytes], str], suffix: str, pack: Pack
) -> None:
    for name, raw in IMAGES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(raw)
    backwards = dict(reversed(IMAGES.items()))
    in_folder, archive = found(str(tmp_path / "folder")), found(put(f"x{suffix}", pack(backwards)))
    assert list(archive.items()) == list(in_folder.items()) == sorted(IMAGES.items())


@archives
def test_what_is_left_out_of_an_archive_is_counted_as_in_a_folder(
    put: Callable[[str, bytes], str], suffix: str, pack: Pack
) -> None:
    files = {"a/b.jpg": picture(0), "a/c.heic.txt": b"", "a/d": b"%PDF-", "a/.e.jpg": b"x", "a/f": picture(1)}
    left_out = LeftOut()
    names = [file.name for file in find_images(put(f"x{suffix}", pack(files)), left_out=left_out)]
    assert names == ["a/b.jpg", "a/f"]
    assert left_out.lines() == ["1 .pdf, 1 .txt, 1 hidden file left out"]


@archives
def test_another_archive_under_the_old_name_is_noticed_when_an_image_is_read(
    put: Callable[[str, bytes], str], suffix: str, pack: Pack
) -> None:
    files = find_images(put(f"x{suffix}", pack(IMAGES)))
    put(f"x{suffix}", pack({name: picture(number + 50) + b" " * number for number, name in enumerate(IMAGES)}))
    with pytest.raises(DataError, match=r"changed since the start"):
        [file.read(ACCESS) for file in files]


@archives
def test_an_archive_that_is_cut_short_is_refused(
    put: Callable[[str, bytes], str], suffix: str, pack: Pack
) -> None:
    raw = pack(IMAGES)
    url = put(f"x{suffix}", raw[: len(raw) // 2])
    with pytest.raises(DataError, match=rf"x\{suffix}.*[Cc]opy it again"):
        find_images(url)


def test_an_inner_tar_that_is_cut_short_is_refused_and_not_read_beyond_its_end(tmp_path: Path) -> None:
    inner = tar_of({"a.jpg": picture(0)})
    whole = 512 + -(-len(picture(0)) // 512) * 512  # the outer tar's next header follows at once
    for end in (512, 1024, 512 + len(picture(0)), whole):
        (tmp_path / "x.tar").write_bytes(tar_of({"c.tar": inner[:end], "d.tar": tar_of({"b.jpg": picture(1)})}))
        with pytest.raises(DataError, match=r"x\.tar.*[Cc]opy it again"):
            find_images(str(tmp_path / "x.tar"))


def test_tars_among_the_images_of_a_tar_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of({"a.jpg": picture(0), "b.tar": tar_of({"c.jpg": picture(1)})}))
    assert list(found(str(tmp_path / "x.tar"))) == ["a.jpg"]


def test_a_large_header_in_a_zip_is_skipped(put: Callable[[str, bytes], str]) -> None:
    """Zipalign and others pad the extra field of the header, and not that of the directory."""
    raw = bytearray(zip_of({"\u2593" * 30 + ".jpg": picture(0), "z.jpg": picture(1)}))
    names = list(found(put("x.zip", bytes(raw))))
    assert len(names) == 2
    padding, name = 3000, len(names[1].encode()) if names[1] != "z.jpg" else len(names[0].encode())
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        directory, second = archive.start_dir, archive.infolist()[1].header_offset
    raw[28:30] = struct.pack("<H", padding)
    raw[30 + name : 30 + name] = bytes(padding)
    entry = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 4)
    raw[entry + 42 : entry + 46] = struct.pack("<I", second + padding)
    end = raw.rindex(b"PK\x05\x06")
    raw[end + 16 : end + 20] = struct.pack("<I", directory + padding)
    assert sorted(found(put("y.zip", bytes(raw))).values()) == sorted((picture(0), picture(1)))


def test_a_damaged_member_of_a_zip_is_rejected_and_no_other(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raw = bytearray(zip_of({"a.jpg": picture(0), "b.jpg": picture(1)}, method))
        raw[60] ^= 255
        (tmp_path / "x.zip").write_bytes(raw)
        file_bytes._descriptor.cache_clear()
        first, second = find_images(str(tmp_path / "x.zip"))
        with pytest.raises(ImageRejectedError, match="zip") as caught:
            first.read(ACCESS)
        assert caught.value.kind == "damaged"
        assert second.read(ACCESS) == picture(1)
        assert images_digest([first, second], ACCESS) != images_digest([second], ACCESS)


def test_a_zip_at_a_url_is_listed_by_its_directory_and_read_by_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {f"{number}.jpg": picture(number) + bytes(300_000) for number in range(8)}
    place = open_place(f"memory://{uuid.uuid4()}")
    place.write("x.zip", zip_of(large))
    fetched = count_bytes(monkeypatch)
    files = find_images(f"{place}/x.zip")
    assert fetched() < 200_000
    assert files[5].read(ACCESS) == large["5.jpg"]
    assert fetched() < 600_000


def encrypted() -> bytes:
    raw = bytearray(zip_of({"a.jpg": picture(0)}))
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def doubled() -> bytes:
    return zip_of({"a.jpg": b"1", "b.jpg": b"2"}).replace(b"b.jpg", b"a.jpg")


def doubled_class() -> bytes:
    return tar_of({"c.tar": tar_of({"a.jpg": b"1"}), "./c.tar": tar_of({"b.jpg": b"2"})})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.zip", encrypted, r"not encrypted \(a\.jpg\)\. Unpack it and name the folder: unzip x\.zip"),
        ("x.zip", lambda: zip_of({"a.jpg": picture(0)}, zipfile.ZIP_LZMA), r"compression 14\)\. Unpack it"),
        ("x.zip", doubled, r"holds a\.jpg 2 times\. Pack it only once"),
        ("x.tar", doubled_class, r"holds c\.tar 2 times\. Pack it only once"),
        ("x.zip", lambda: b"no zip" * 99, rf"expected {EXPECTED} \(this file is none of them\)"),
    ],
)
def test_archives_that_cannot_be_used_are_refused_in_one_line(
    put: Callable[[str, bytes], str], name: str, content: Callable[[], bytes], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        find_images(put(name, content()))
    assert "\n" not in str(caught.value)


def test_a_file_at_a_url_that_is_not_what_its_name_says_is_named() -> None:
    place = open_place(f"memory://{uuid.uuid4()}")
    place.write("x.tar", zip_of(IMAGES))
    with pytest.raises(ConfigError, match=r"a tar, as its name says \(the file is a zip\)\. Rename it"):
        find_images(f"{place}/x.tar")


def test_here_the_content_of_a_file_decides_and_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(zip_of(IMAGES))
    (tmp_path / "y.bin").write_bytes(tar_of(IMAGES))
    assert [source.kind for source in expand_sources([f"{tmp_path}/x.tar", f"{tmp_path}/y.bin"])] == ["zip", "tar"]


def test_several_sources_and_patterns_are_one_list_whose_names_are_those_of_each_source(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(IMAGES))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/one.jpg").write_bytes(picture(8))
    (tmp_path / "c").mkdir()
    for name in ("y", "x"):
        (tmp_path / f"c/{name}.zip").write_bytes(zip_of({f"{name}/1.jpg": picture(9), "same.jpg": name.encode()}))
    (tmp_path / "c/notes.txt").write_text("")
    images = [f"{tmp_path}/a.tar", f"{tmp_path}/b", f"{tmp_path}/c/*.zip"]
    sources = expand_sources(images)
    assert [os.path.relpath(source.path, tmp_path) for source in sources] == ["a.tar", "b", "c/x.zip", "c/y.zip"]
    listed = [(file.name, file.source.path[-5:]) for file in find_images(images) if "/" not in file.name]
    assert listed == [("one.jpg", str(tmp_path / "b")[-5:]), ("same.jpg", "x.zip"), ("same.jpg", "y.zip")]
    assert len(find_images(images)) == 7 + 1 + 4
    assert list_images(expand_sources([f"{tmp_path}/c"])) == list_images(expand_sources([f"{tmp_path}/c/?.zip"]))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["*.zip"], r"'\*\.zip', expected a pattern that matches something"),
        (["a.tar", "*.tar"], r"each source once\. It is named twice, or a pattern matches it"),
        (["s3://bucket/*.tar"], r"without a pattern.*\{000\.\.099\}"),
        (["*.txt"], "this file is none"),
    ],
)
def test_patterns_that_name_nothing_or_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.tar").write_bytes(tar_of(IMAGES))
    Path("a.txt").write_text("x")
    with pytest.raises(ConfigError, match=message):
        expand_sources(images)


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    (tmp_path / "x[1].tar").write_bytes(tar_of(IMAGES))
    assert len(find_images(f"{tmp_path}/x[1].tar")) == 7


def test_what_is_left_out_of_all_inner_tars_is_counted_together(put: Callable[[str, bytes], str]) -> None:
    inner = {f"{name}.tar": tar_of({"x.jpg": picture(0), "y.txt": b"", "run/.z.jpg": b""}) for name in "abc"}
    left_out = LeftOut()
    files = find_images(put("x.tar", tar_of(inner)), left_out=left_out)
    assert [file.name for file in files] == ["a/x.jpg", "b/x.jpg", "c/x.jpg"]
    assert left_out.lines() == ["3 .txt, 3 hidden files left out"]
