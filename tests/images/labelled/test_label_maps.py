"""Label maps: pairs of images and maps, what their numbers mean, and what is refused with file and number."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.archives import tar_of, zip_of

from beit_dist.config.labelled import LabelMapsConfig
from beit_dist.errors import ConfigError, DataError
from beit_dist.images.labelled.label_maps import IGNORED, LabelMaps, class_pixels, find_label_maps
from beit_dist.storage.access import Access

ACCESS = Access()
NUMBERS = np.random.default_rng(0).integers(0, 3, (12, 10))


def photo(width: int = 10, height: int = 12) -> bytes:
    raw = io.BytesIO()
    Image.new("RGB", (width, height), (9, 90, 200)).save(raw, "JPEG")
    return raw.getvalue()


def grey(numbers: Any, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG of these numbers, written by hand: Pillow writes no grey of 2 or 4 bits."""
    rows = np.asarray(numbers)
    height, width = rows.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = b""
    for row in rows:
        digits = "".join(f"{int(number):0{bits}b}" for number in row)
        digits += "0" * (-len(digits) % 8)
        packed += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(3 * 2**bits)) if colour == 3 else b""
    body = chunk(b"IHDR", header) + palette + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def files(maps: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    maps = {f"{split}/{n}": grey(NUMBERS) for split in ("train", "val") for n in "ab"} if maps is None else maps
    photos = {f"images/{name}.jpg": photo() for name in maps}
    return photos | {f"labels/{name}.png": raw for name, raw in maps.items()}


def write(root: Path, content: Mapping[str, bytes]) -> Path:
    for name, raw in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def find(where: object, ids: tuple[int, int] | None = (0, 2), ignore: int | None = 255, **more: Any) -> LabelMaps:
    return find_label_maps(str(where), ACCESS, LabelMapsConfig(ids=ids, ignore_label=ignore), **more)


def stems(found: LabelMaps) -> list[str]:
    return [file.name.rpartition(".")[0] for file in found.files]


# ----------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "annotations"])
def test_images_and_maps_of_the_same_name_are_pairs(kind: str, put: Callable[[str, bytes], str]) -> None:
    content = {f"set/{name}": raw for name, raw in files().items()}
    if kind == "annotations":
        content = {name.replace("/labels/", "/annotations/"): raw for name, raw in content.items()}
    if kind in ("zip", "tar"):
        where = put(f"a.{kind}", (zip_of if kind == "zip" else tar_of)(content))
    else:
        for name, raw in content.items():
            where = put(name, raw).rpartition("/set/")[0] + "/set"
    found = find(where)
    assert [name.rpartition("images/")[2] for name in stems(found)] == ["train/a", "train/b", "val/a", "val/b"]
    for image, own in zip(found.files, found.maps, strict=True):
        assert own.name.replace("annotations", "labels").replace("labels", "images")[:-4] == image.name[:-4]
    assert found.classes == ("0", "1", "2")
    pixels, labels = found.read(0, ACCESS)
    assert (pixels.shape, labels.dtype) == ((12, 10, 3), np.uint8)
    assert labels.tolist() == NUMBERS.tolist()


def test_a_part_of_the_images_is_named_by_its_folder(put: Callable[[str, bytes], str]) -> None:
    for name, raw in files().items():
        root = put(f"images/set/{name}", raw).rpartition("/set/")[0]
    found = find(f"{root}/set/images/train")
    assert stems(found) == ["a", "b"]
    assert found.read(1, ACCESS)[1].tolist() == NUMBERS.tolist()
    both = find_label_maps(
        [f"{root}/set/images/train", f"{root}/set/images/val"], ACCESS, LabelMapsConfig(ids=(0, 2))
    )
    assert stems(both) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["labels/train/a.png"], r"images/train/a\.jpg has no label map"),
        (["labels/train/a.png", "labels/val/b.png"], r"images/train/a\.jpg and 1 more images have no label map"),
        (["images/val/a.jpg"], r"labels/val/a\.png has no image"),
    ],
)
def test_an_image_or_map_alone_is_named(tmp_path: Path, removed: list[str], message: str) -> None:
    content = files()
    for name in removed:
        del content[name]
    with pytest.raises(DataError, match=message):
        find(write(tmp_path, content))


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png have the same name"):
        find(write(tmp_path, files() | {"images/train/a.png": grey(NUMBERS)}))


def test_a_folder_without_pairs_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected images/ and, with the same names, PNG maps in labels/"):
        find(write(tmp_path, {"x/a.jpg": photo()}))


# ------------------------------------------------------------------------------------------ what numbers mean


@pytest.mark.parametrize(
    ("bits", "colour"), [(2, 0), (4, 0), (8, 0), (16, 0), (2, 3), (4, 3), (8, 3)], ids=lambda value: str(value)
)
def test_grey_and_palettes_of_any_depth_hold_the_numbers_that_were_written(
    tmp_path: Path, bits: int, colour: int
) -> None:
    found = find(write(tmp_path, files({"a": grey(NUMBERS, bits, colour)})))
    assert found.read(0, ACCESS)[1].tolist() == NUMBERS.tolist()


def test_a_map_of_one_bit_has_two_classes(tmp_path: Path) -> None:
    found = find(write(tmp_path, files({"a": grey(NUMBERS % 2, 1)})), ids=None)
    assert found.classes == ("0", "1")
    assert found.read(0, ACCESS)[1].tolist() == (NUMBERS % 2).tolist()


def test_classes_may_begin_at_one_and_another_number_stand_for_none(tmp_path: Path) -> None:
    found = find(write(tmp_path, files({"a": grey(NUMBERS)})), ids=(1, 2), ignore=0)
    assert found.classes == ("1", "2")
    assert found.read(0, ACCESS)[1].tolist() == np.where(NUMBERS == 0, IGNORED, NUMBERS - 1).tolist()


def test_without_settings_the_largest_number_tells_the_classes(tmp_path: Path) -> None:
    high: NDArray[Any] = np.where(NUMBERS == 2, 11, NUMBERS)
    high[0, 0] = 5
    found = find(write(tmp_path, files({"a": grey(NUMBERS), "b": grey(high)})), ids=None, ignore=11)
    assert len(found.classes) == 6
    assert class_pixels(found, ACCESS)[5] == 1
    assert class_pixels(found, ACCESS, most=1).tolist() == [*np.bincount(NUMBERS.ravel()).tolist(), 0, 0, 0]


def test_names_come_from_a_file_and_number_the_classes(put: Callable[[str, bytes], str]) -> None:
    for name, raw in {**files(), "classes.txt": "\ufeffsky\n building \npole\n\n".encode()}.items():
        where = put(f"set/{name}", raw).rpartition("/set/")[0] + "/set"
    for spec in (where, f"{where}/images/train"):
        assert find(spec, ids=None).classes == ("sky", "building", "pole")


def test_held_out_maps_have_the_classes_of_the_training_data(tmp_path: Path) -> None:
    found = find(write(tmp_path, files()), ids=None, classes=("a", "b", "c", "d"))
    assert found.classes == ("a", "b", "c", "d")


def test_the_digest_tells_other_maps_and_other_meanings(tmp_path: Path) -> None:
    digests = {find(write(tmp_path, files()), ids, ignore).digest for ids, ignore in (((0, 2), 255), ((0, 2), 9))}
    digests.add(find(tmp_path, (0, 3)).digest)
    other = NUMBERS.copy()
    other[3, 3] += 1
    digests.add(find(write(tmp_path, {"labels/val/b.png": grey(other)})).digest)
    assert len(digests) == 4


# -------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            grey(np.where(NUMBERS == 2, 77, NUMBERS)),
            r"got the number 77 \(\d+ pixels\), expected a class from 0 to 2",
        ),
        (grey(NUMBERS + 300, 16), r"got the number 30\d"),
        (grey(NUMBERS[:, :9]), r"got 9×12 px, expected 10×12 px, as its image .*images/a\.jpg has"),
        (photo(), "not a PNG, as label maps must be"),
        (grey(np.zeros((12, 10)), 8, 6)[:60], "in colours"),
        (grey(NUMBERS)[:60], "labels/a.png: "),
        (grey(NUMBERS).replace(b"IDAT", b"IDAT\1", 1), "labels/a.png: "),
    ],
    ids=["number", "16 bits", "size", "jpeg", "colours", "cut short", "damaged"],
)
def test_a_bad_map_is_refused_when_it_is_read_with_file_and_number(
    tmp_path: Path, raw: bytes, message: str
) -> None:
    found = find(write(tmp_path, files({"a": raw})))
    with pytest.raises(DataError, match=message) as caught:
        found.read(0, ACCESS)
    assert str(tmp_path / "labels/a.png") in str(caught.value)


def test_a_bad_image_of_an_archive_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(files({"a": grey(NUMBERS)}) | {"images/a.jpg": photo()[:200]}))
    with pytest.raises(DataError, match=r"a\.tar, the image at byte \d+, images/a\.jpg: "):
        find(tmp_path / "a.tar").read(0, ACCESS)


@pytest.mark.parametrize(
    ("names", "ids", "ignore", "message"),
    [
        ("a\nb\nb", None, 255, "expected a name in each line, each only once"),
        ("a\n\nb", None, 255, "expected a name in each line, each only once"),
        ("a\nb\nvoid", None, 2, r"maps\.ignore_label: got 2, .*It is the class void"),
        ("a\nb", (0, 2), 255, r"maps\.ids: got \(0, 2\), expected as many numbers as .*\(2\)"),
        ("a", None, 255, "got 1 classes, expected 2 to 255"),
        ("", (3, 3), 255, "got 1 classes, expected 2 to 255"),
        ("", (0, 255), None, "got 256 classes, expected 2 to 255"),
        ("", None, None, r"a\.png: got the number 255, .*set maps\.ignore_label=255"),
    ],
)
def test_classes_that_contradict_one_another_are_refused(
    tmp_path: Path, names: str, ids: tuple[int, int] | None, ignore: int | None, message: str
) -> None:
    numbers = NUMBERS.copy()
    numbers[0, 0] = 255
    content = files({"a": grey(numbers)})
    if names:
        content["classes.txt"] = names.encode()
    with pytest.raises((DataError, ConfigError), match=message):
        find(write(tmp_path, content), ids, ignore)
