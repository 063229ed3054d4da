"""Images and their classes are found alike in every source; what cannot be right is refused at its name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.archives import IMAGES, parquet_of, picture, rows_of, tar_of, zip_of

from beit_dist.errors import ConfigError, DataError
from beit_dist.images.files import ImageFile
from beit_dist.images.labelled.file_table import FileTable
from beit_dist.images.labelled.images import LabelledImages, find_labelled
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.storage.access import Access

ACCESS = Access()
CLASSES = {name: name.partition("/")[0] for name in IMAGES}


def write(root: Path, files: Mapping[str, bytes]) -> str:
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return str(root)


def classes_by_content(found: LabelledImages) -> dict[bytes, str]:
    """The class of each image, by the image's bytes."""
    numbered = zip(found.files, found.labels.tolist(), strict=True)
    return {file.read(ACCESS): found.classes[label] for file, label in numbered}


def of_a_webdataset(suffix: str, label: Callable[[str], bytes]) -> bytes:
    """Samples of two files each, all in one folder."""
    files: dict[str, bytes] = {}
    for number, (name, raw) in enumerate(IMAGES.items()):
        files[f"all/{number:03d}.{'png' if number % 2 else 'jpg'}"] = raw
        files[f"all/{number:03d}.{suffix}"] = label(CLASSES[name])
    return tar_of(files)


def of_a_list(files: Mapping[str, bytes]) -> bytes:
    rows = [f"../flat/{number}.jpg,{CLASSES[name]},{len(raw)}" for number, (name, raw) in enumerate(files.items())]
    return "\n".join(["\ufeffpath,label,bytes", *rows]).encode()


def source(kind: str, put: Callable[[str, bytes], str]) -> str:
    """The images as one kind of source."""
    if kind == "folder":
        for name, raw in IMAGES.items():
            path = put(f"folder/{name}", raw)
        return path.rpartition("/class-")[0]
    if kind == "csv":
        for number, raw in enumerate(IMAGES.values()):
            put(f"flat/{number}.jpg", raw)
        return put("lists/train.CSV", of_a_list(IMAGES))
    made: dict[str, Callable[[], bytes]] = {
        "zip": lambda: zip_of(IMAGES),
        "tar": lambda: tar_of(IMAGES),
        "cls": lambda: of_a_webdataset("cls", lambda label: f"{label}\n".encode()),
        "json": lambda: of_a_webdataset("json", lambda label: json.dumps({"x": 1, "label": label}).encode()),
        "parquet": lambda: parquet_of(rows_of(IMAGES), names=["class-0", "class-1", "class-2"]),
    }
    suffix = kind if kind in ("zip", "parquet") else "tar"
    return put(f"{kind}.{suffix}", made[kind]())


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "cls", "json", "parquet", "csv"])
def test_every_source_gives_the_same_classes(kind: str, put: Callable[[str, bytes], str]) -> None:
    found = find_labelled(source(kind, put), ACCESS)
    assert found.classes == ("class-0", "class-1", "class-2")
    assert classes_by_content(found) == {raw: CLASSES[name] for name, raw in IMAGES.items()}
    assert found.counts().tolist() == [3, 2, 2]
    names = [file.name for file in found.files]
    assert names == sorted(names, key=os.fsencode)
    assert len(found) == len(IMAGES)


def test_several_sources_are_one_list(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"cat/1.jpg": picture(1), "dog/3.jpg": picture(2)})
    write(tmp_path, {"b.csv": b"path,label\nc/2.jpg,cat\n", "c/2.jpg": picture(3)})
    found = find_labelled([folder, str(tmp_path / "b.csv")], ACCESS)
    assert [found.classes[label] for label in found.labels] == ["cat", "cat", "dog"]
    assert [file.name for file in found.files] == ["c/2.jpg", "cat/1.jpg", "dog/3.jpg"]


def test_numbers_as_names_are_sorted_as_strings(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"{label}/x.jpg": picture(label) for label in (2, 10)})
    assert find_labelled(folder, ACCESS).classes == ("10", "2")


def test_given_classes_keep_their_order_though_some_have_no_image(tmp_path: Path) -> None:
    folder = write(tmp_path, {"b/1.jpg": picture(1)})
    found = find_labelled(folder, ACCESS, classes=("c", "b", "a"))
    assert (found.classes, found.labels.tolist(), found.counts().tolist()) == (("c", "b", "a"), [1], [0, 1, 0])


def test_the_digest_tells_other_labels_and_other_images(tmp_path: Path) -> None:
    write(tmp_path, {"x.jpg": picture(1), "y.jpg": picture(2)})
    digests = set()
    for labels in ("ab", "ba", "ac"):
        (tmp_path / "l.csv").write_text(f"path,label\nx.jpg,{labels[0]}\ny.jpg,{labels[1]}\n")
        digests.add(find_labelled(str(tmp_path / "l.csv"), ACCESS).digest)
    (tmp_path / "y.jpg").write_bytes(picture(3))
    digests.add(find_labelled(str(tmp_path / "l.csv"), ACCESS).digest)
    assert len(digests) == 4


def test_labels_beside_images_are_not_read_where_nobody_asks(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(of_a_webdataset("cls", str.encode))
    sources = expand_sources([str(tmp_path / "a.tar")])
    assert {entry.class_name for entry in list_images(sources)} == {"all"}


# -------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.jpg": picture(1), "a/2.jpg": picture(2)}, r"1 of 2 images have no class \(.*/1\.jpg\)"),
        ({"1.jpg": picture(1)}, r"images have no class \(.*/1\.jpg\)\. Put each image into a folder"),
        ({"a/1.jpg": picture(1), "a/2.jpg": picture(2)}, "got one class only, a, expected two or more"),
        ({"a/1.txt": b"x"}, r"no image found: 1 \.txt left out"),
    ],
)
def test_images_without_two_classes_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_labelled(write(tmp_path, files), ACCESS)


def test_an_empty_folder_among_the_classes_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train/a/1.jpg": picture(1), "train/b/1.jpg": picture(2)})
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(DataError, match=r"data: .*train/dog: an empty folder among the classes"):
        find_labelled(folder, ACCESS)
    assert find_labelled(folder, ACCESS, classes=("a", "b", "dog")).counts().tolist() == [1, 1, 0]


def test_a_class_that_only_the_held_out_images_have_is_named_with_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a/1.jpg": picture(1), "owl/7.jpg": picture(2)})
    with pytest.raises(DataError, match=r"validation\.data: got the class owl, .*: .*owl/7\.jpg"):
        find_labelled(folder, ACCESS, classes=("a", "b"), field="validation.data")


def test_shards_of_ours_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = write(tmp_path, {"manifest.json": b"{}", "v00/shard-000000.tar": b"x"})
    with pytest.raises(ConfigError, match=r"shards hold views and tokens.*Name the images from which"):
        find_labelled(folder, ACCESS)


def test_a_sample_of_a_webdataset_without_a_label_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"x/1.jpg": picture(1), "x/1.cls": b"0", "x/2.jpg": picture(2)}))
    with pytest.raises(DataError, match="1 of 2 images have no class"):
        find_labelled(str(tmp_path / "a.tar"), ACCESS)


def test_a_class_file_counts_more_than_json_in_either_order(tmp_path: Path) -> None:
    beside = {"cls": b"7", "json": b'{"label": "x", "cls": "y"}'}
    files: dict[str, bytes] = {}
    for key, order in {"1": ("cls", "json"), "2": ("json", "cls"), "3": ("json",)}.items():
        files |= {f"{key}.{suffix}": beside[suffix] for suffix in order} | {f"{key}.jpg": picture(int(key))}
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    found = find_labelled(str(tmp_path / "a.tar"), ACCESS)
    assert [found.classes[label] for label in found.labels] == ["7", "7", "x"]


def test_json_files_without_a_label_leave_the_folders_names(tmp_path: Path) -> None:
    files = {"a/1.jpg": picture(1), "a/1.json": b'{"size": 3}', "b/2.jpg": picture(2), "b/x.json": b"[1"}
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    assert find_labelled(str(tmp_path / "a.tar"), ACCESS).classes == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n", r"l\.csv: got the header 'file,label', expected path,label"),
        ("", "got the header '', expected path,label"),
        ("path,label\nx.jpg,a\nx.jpg,b\n", r"l\.csv, line 3: x\.jpg again, as in line 2"),
        ("path,label\nx.jpg,\n", "line 2: no label"),
        ("path,label\nx.jpg\n", "line 2: no label"),
        ("path,label\nx.jpg,a\ngone.jpg,b\n", r"l\.csv, line 3: gone\.jpg is not in .*Paths are relative"),
        ("path,label\nx.jpg,\xff\n", "not UTF-8"),
    ],
)
def test_a_list_that_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, {"x.jpg": picture(1), "l.csv": text.encode("latin-1")})
    with pytest.raises(DataError, match=message):
        find_labelled(str(tmp_path / "l.csv"), ACCESS)


def test_a_list_that_is_not_there_is_refused_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\.data: got '.*no\.csv', expected a CSV"):
        find_labelled(str(tmp_path / "no.csv"), ACCESS, classes=("a",), field="validation.data")


def test_a_source_that_is_none_is_refused_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^validation\.data: got"):
        find_labelled(str(tmp_path / "no"), ACCESS, classes=("a",), field="validation.data")


# -------------------------------------------------------------------------------------------------- the table


def test_a_table_gives_the_files_that_it_was_made_of(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of({"ü/1.jpg": picture(1), "b.jpg": picture(2)}))
    write(tmp_path, {os.fsdecode(b"f/\xff.jpg"): picture(3)})
    sources = expand_sources([str(tmp_path / "a.zip"), str(tmp_path / "f")])
    entries = list_images(sources)
    table = FileTable(sources, entries)
    assert list(table) == [ImageFile(sources[entry.source], entry) for entry in entries]
    assert table[-1] == table[2]
    assert table[1:] == [table[1], table[2]]
    with pytest.raises(IndexError):
        table[3]
