"""Parquet files of Hugging Face image data sets: rows, labels, what is read of the file, and what is refused."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.archives import ACCESS, IMAGES, count_bytes, found, parquet_of, picture, rows_of

from beit_dist.errors import ConfigError, DataError
from beit_dist.images.files import find_images
from beit_dist.images.left_out import LeftOut
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.images.sources import parquet as parquet_source
from beit_dist.storage.opening import open_place


@pytest.fixture(autouse=True)
def _forget_parquet() -> None:
    parquet_source.opened.forget()


def test_a_parquet_file_lists_its_rows_by_number_and_reads_them(put: Callable[[str, bytes], str]) -> None:
    name = "train-00000-of-00004.parquet"
    listed = found(put(name, parquet_of(rows_of(IMAGES))))
    assert list(listed) == [f"{name}/{row:06d}" for row in range(7)]
    assert list(listed.values()) == list(IMAGES.values())


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (None, ["0", "1", "2", "0"]),
        (["tench, Tinca", "dog", "cat"], ["tench, Tinca", "dog", "cat", "tench, Tinca"]),
    ],
)
def test_labels_of_parquet_are_those_of_its_column_by_name_where_the_metadata_have_names(
    put: Callable[[str, bytes], str], names: list[str] | None, labels: list[str]
) -> None:
    sources = expand_sources([put("x.parquet", parquet_of(rows_of(IMAGES), names=names))])
    assert [entry.class_name for entry in list_images(sources)][:4] == labels


def test_parquet_without_labels_has_none_though_its_names_look_like_folders(tmp_path: Path) -> None:
    unlabelled = [{"image": row["image"]} for row in rows_of(IMAGES)]
    hidden = [{**row, "label": -1} for row in rows_of(IMAGES)]
    for rows, names in ((unlabelled, None), (hidden, None), (hidden, ["a", "b", "c"])):
        (tmp_path / "x.parquet").write_bytes(parquet_of(rows, names=names))
        assert {entry.class_name for entry in list_images(expand_sources([f"{tmp_path}/x.parquet"]))} == {""}


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}])
def test_rows_without_an_image_are_left_out_and_counted(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = rows_of(IMAGES)
    rows[2]["image"] = None
    rows[4]["image"] = {"bytes": None, "path": "elsewhere.jpg"}
    (tmp_path / "x.parquet").write_bytes(parquet_of(rows, **options))
    left_out = LeftOut()
    files = find_images(f"{tmp_path}/x.parquet", left_out=left_out)
    assert [file.name[-1] for file in files] == list("01356")
    assert [file.read(ACCESS) for file in files] == [list(IMAGES.values())[row] for row in (0, 1, 3, 5, 6)]
    assert left_out.lines()[0].startswith(
        "2 rows without an image left out (x.parquet/000002): embed the images' bytes"
    )


def test_the_only_column_of_images_may_have_any_name(tmp_path: Path) -> None:
    rows = [{"id": 1, "picture": row["image"]} for row in rows_of(IMAGES)]
    (tmp_path / "x.parquet").write_bytes(parquet_of(rows))
    assert list(found(f"{tmp_path}/x.parquet").values()) == list(IMAGES.values())


def test_a_row_is_found_without_a_look_at_other_row_groups_and_the_last_one_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"image": {"bytes": os.urandom(100_000), "path": None}} for _ in range(40)]
    place = open_place(f"memory://{uuid.uuid4()}")
    place.write("x.parquet", parquet_of(rows, group=4))
    fetched, read, original = count_bytes(monkeypatch), [], parquet_source._Table.images

    def noting(table: parquet_source._Table, group: int) -> Any:
        read.append(group)
        return original(table, group)

    monkeypatch.setattr(parquet_source._Table, "images", noting)
    files = find_images(f"{place}/x.parquet")
    assert fetched() < 200_000  # of 4 MB: no images
    for number in (22, 20, 21, 23):
        assert files[number].read(ACCESS) == rows[number]["image"]["bytes"]
    assert fetched() < 700_000  # one row group
    assert read == [5]


def test_another_parquet_file_under_the_old_name_is_noticed(put: Callable[[str, bytes], str]) -> None:
    files = find_images(put("x.parquet", parquet_of(rows_of(IMAGES))))
    for changed in (rows_of(IMAGES)[:3], rows_of({name: raw + b"x" for name, raw in IMAGES.items()})):
        parquet_source.opened.forget()
        put("x.parquet", parquet_of(changed))
        with pytest.raises(DataError, match=r"changed since .*no image in row 0 of row group 1"):
            files[3].read(ACCESS)


def test_damaged_parquet_is_refused_when_it_is_listed_or_read(tmp_path: Path) -> None:
    path, raw = tmp_path / "x.parquet", parquet_of(rows_of(IMAGES), compression="none")
    path.write_bytes(raw[:-30])
    with pytest.raises(DataError, match=r"x\.parquet: damaged.*Copy it again"):
        find_images(str(path))
    path.write_bytes(raw)
    files = find_images(str(path))
    path.write_bytes(raw[:4] + bytes(60) + raw[64:])
    with pytest.raises(DataError, match=r"x\.parquet: damaged.*Copy it again"):
        files[0].read(ACCESS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["text"], r"the file has the columns text\)\. Or write the images to a folder, tar or zip"),
        (["left", "right"], r"the file has 2 of them: left, right\)\. Rename one of them to image"),
    ],
)
def test_parquet_without_one_column_of_images_is_refused(tmp_path: Path, columns: list[str], message: str) -> None:
    image = {"bytes": picture(0), "path": "a.jpg"}
    rows = [{name: "x" if name == "text" else image for name in columns}]
    (tmp_path / "x.parquet").write_bytes(parquet_of(rows))
    with pytest.raises(ConfigError, match=message) as caught:
        find_images(f"{tmp_path}/x.parquet")
    assert "\n" not in str(caught.value)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'beit_dist\[parquet\]'"):
        find_images(f"{tmp_path}/x.parquet")


def test_a_folder_of_parquet_files_stands_for_them(tmp_path: Path) -> None:
    for number in (1, 0):
        (tmp_path / f"train-{number}.parquet").write_bytes(parquet_of(rows_of(IMAGES)))
    (tmp_path / "README.md").write_text("")
    files = find_images(str(tmp_path))
    assert [file.name for file in files] == [f"train-{n}.parquet/{row:06d}" for n in (0, 1) for row in range(7)]
