"""The offline job on every kind of source: the bytes do not depend on it, on the workers, or on a restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.archives import deflated, parquet_of, picture, tar_of, tar_of_tars, zip_of

from beit_dist.errors import DataError
from beit_dist.storage.local import LocalPlace
from beit_dist.tokenizing.sources import SourceList, read_header

Content = Callable[[Path], dict[str, str]]


def files_of(bench: Any) -> dict[str, bytes]:
    return {path.relative_to(bench.images).as_posix(): path.read_bytes() for path in bench.images.rglob("*.png")}


@pytest.mark.parametrize("pack", [tar_of, tar_of_tars, zip_of, deflated])
def test_an_archive_gives_the_shards_of_its_folder_with_two_workers_and_a_restart(
    bench: Any, read_content: Content, pack: Any
) -> None:
    archive = bench.root / "archive"
    archive.write_bytes(pack(files_of(bench)))
    folder, out = bench.run("folder"), bench.root / "out"
    bench.work(out, 1, 2, decoders=1, source=str(archive))
    (out / "v00/shard-000001.tar").unlink()
    assert bench.work(out, 1, 2, source=str(archive))[:2] == (1, 1)
    bench.work(out, 0, 2, source=str(archive))
    bench.finish(out)
    assert read_content(out) == read_content(folder)


def test_parquet_gives_the_pixels_and_labels_of_its_folder_with_two_workers(
    bench: Any, read_content: Content
) -> None:
    names = ["class-0", "class-1", "class-2"]
    files = dict(sorted(files_of(bench).items()))
    rows = [{"image": {"bytes": raw, "path": None}, "label": int(name[6])} for name, raw in files.items()]
    (bench.root / "train.parquet").write_bytes(parquet_of(rows, names=names))
    bench.source = str(bench.root / "train.parquet")
    one, two = bench.run("one"), bench.root / "two"
    for index in (1, 0):
        bench.work(two, index, 2, decoders=1)
    bench.finish(two)
    assert read_content(one) == read_content(two)
    in_folder = bench.root / "folder"
    bench.job(in_folder, source=str(bench.images))
    listed, expected = (SourceList(LocalPlace(out), 99).read(0) for out in (one, in_folder))
    assert [image.label for image in listed] == [image.label for image in expected]
    assert [list(files)[int(image.name[-6:])] for image in listed] == [image.name for image in expected]


def test_several_sources_are_one_job_and_their_list_tells_them_apart(bench: Any, read_content: Content) -> None:
    same = {"a/1.png": picture(1), "b/1.png": picture(3)}
    (bench.root / "x.zip").write_bytes(zip_of(same))
    (bench.root / "y.tar").write_bytes(tar_of(same))
    bench.source = [str(bench.images), f"{bench.root}/*.zip", f"{bench.root}/y.tar"]
    one, two = bench.run("one"), bench.root / "two"
    for index in (0, 1):
        bench.work(two, index, 2)
    bench.finish(two)
    assert read_content(one) == read_content(two)
    lines = [json.loads(line) for line in (one / "sources.jsonl").read_text().splitlines()]
    assert [kind for kind, _ in lines[0]["sources"]] == ["folder", "zip", "tar"]
    assert len({(line["source"], line["name"]) for line in lines[1:]}) == 13 + 4
    assert sum(line["name"] == "a/1.png" for line in lines[1:]) == 2


def test_a_damaged_member_of_a_zip_is_one_reject(bench: Any) -> None:
    raw = bytearray(zip_of(files_of(bench)))
    raw[200] ^= 255
    (bench.root / "x.zip").write_bytes(raw)
    for decoders in (0, 1):
        out = bench.root / f"out-{decoders}"
        report = bench.work(out, source=f"{bench.root}/x.zip", decoders=decoders)
        assert [(entry.kind, "zip" in entry.reason) for entry in report.rejected] == [("damaged", True)]


def test_a_list_of_a_kind_that_this_version_does_not_know_is_refused(bench: Any) -> None:
    bench.job(bench.root / "out")
    path = bench.root / "out/sources.jsonl"
    path.write_text(path.read_text().replace('"folder"', '"lmdb"'))
    with pytest.raises(DataError, match="got the kind 'lmdb', expected folder, tar, zip, parquet"):
        read_header(LocalPlace(bench.root / "out"))
