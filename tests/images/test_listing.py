"""What is taken for an image, and what is left out: by name, by first bytes, and by what lies around it."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from beit_dist.errors import ConfigError, DataError
from beit_dist.images import decoding as images
from beit_dist.images import heif
from beit_dist.images.file_kinds import by_content
from beit_dist.images.files import find_images
from beit_dist.images.left_out import LeftOut
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.storage.opening import open_place
from beit_dist.weights.tokenizer_files import FORMAT

PHOTO = b"\xff\xd8\xff\xe0" + bytes(2000)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 12345\n" % 0

Where = Callable[[Path], str]


def in_folder(folder: Path) -> str:
    return str(folder)


def in_tar(folder: Path) -> str:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, ".")
    return str(path)


def at_url(folder: Path) -> str:
    place = open_place(f"memory://listing{folder}")
    for path in folder.rglob("*"):
        if path.is_file():
            place.write(str(path.relative_to(folder)), path.read_bytes())
    return str(place)


everywhere = pytest.mark.parametrize("where", [in_folder, in_tar, at_url])


@pytest.fixture(autouse=True)
def _without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As most have it, whatever is installed here."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    forget_heif()
    yield
    monkeypatch.undo()
    forget_heif()


def forget_heif() -> None:
    heif.heif_version.cache_clear()
    images._formats.cache_clear()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def listed(source: str, sniff: bool = True) -> tuple[list[str], list[str]]:
    """Names of the images, and the lines on what is left out."""
    left_out = LeftOut()
    return [file.name for file in find_images(source, sniff=sniff, left_out=left_out)], left_out.lines()


@everywhere
def test_names_of_cameras_browsers_and_downloads_are_images(tmp_path: Path, where: Where) -> None:
    names = [
        "a.JFIF",
        "b.pjpeg",
        "c.pjp",
        "d.dib",
        "e.pnm",
        "f.j2k",
        "g.jpg?w=800",
        "h.png?v=1.2",
        "i",
        "j.jpg_large",
    ]
    names += ["k.7", "l.jpg~", "m?id=1.jpg", "n.avifs", "o.apng", "p.jpx"]
    assert listed(where(write(tmp_path / "in", dict.fromkeys(names, PHOTO)))) == (names, [])


def test_usual_names_are_known_without_a_look(tmp_path: Path) -> None:
    names = ["a.jfif", "b.pjpeg", "c.dib", "d.pnm", "e.j2k", "f.jpg?w=800", "g.JPG"]
    assert listed(at_url(write(tmp_path, dict.fromkeys(names, PHOTO))), sniff=False) == (sorted(names), [])


@everywhere
def test_what_is_left_out_is_counted_by_kind_with_the_way_out(tmp_path: Path, where: Where) -> None:
    files = {f"{number}.heic": PHOTO for number in range(15)} | {f"{number}.txt": b"x" for number in range(1200)}
    files |= {
        "a.jpg": PHOTO,
        "b.jxl": b"",
        "c": b"\0\0\0\x1cftypheic\0\0\0\0mif1heic",
        "d.nef": b"II*\0",
        "e": b"e",
    }
    files |= {"x.tar": b"", "y.parquet": b"", "z.odd": b"z"}
    assert listed(where(write(tmp_path / "in", files))) == (
        ["a.jpg"],
        [
            "16 .heic left out: pip install pillow-heif",
            "1 .jxl, 1 .nef left out: convert them to JPEG or PNG",
            "1 .parquet, 1 .tar left out: name each as a source of its own: 'a-{000..009}.tar' 'b/*.zip'",
            "1,200 .txt, 1 .odd, 1 file without a usual suffix left out",
        ],
    )


def test_files_with_usual_names_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.jpg", "b.txt", "c.json", "d.xml", "e.csv", "f.nef", ".g", "h"]
    write(tmp_path, dict.fromkeys(names, PHOTO))
    opened = []
    original = open

    def noting(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(os.path.basename(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", noting)
    assert listed(str(tmp_path))[0] == ["a.jpg", "h"]
    assert opened == ["h"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_every_format_that_is_decoded_is_known_by_its_first_bytes(kind: str) -> None:
    raw = io.BytesIO()
    Image.new("RGB", (20, 20)).save(raw, kind)
    assert by_content(raw.getvalue()[:64]) == "image"
    assert images.decode(raw.getvalue()).size == (20, 20)


def test_a_dib_is_decoded_though_it_has_no_header_of_a_file() -> None:
    raw = io.BytesIO()
    Image.new("RGB", (20, 20)).save(raw, "DIB")
    assert images.decode(raw.getvalue()).size == (20, 20)


@pytest.mark.parametrize(
    "text", [b"BMW,3,blue\n" * 9, b"P1 says\n" * 9, b"Python\n" * 9, b"", b"\0\0\0\x14ftypisom"]
)
def test_what_begins_a_little_like_an_image_is_none(text: bytes) -> None:
    assert by_content(text) == "unknown"


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = types.SimpleNamespace(register_heif_opener=lambda: None, __version__="1.0")
    monkeypatch.setitem(sys.modules, "pillow_heif", installed)
    forget_heif()
    files = {"a.heic": PHOTO, "b": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"}
    assert listed(str(write(tmp_path, files))) == (["a.heic", "b"], [])
    assert "HEIF" in images._formats()


def test_real_heic_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    forget_heif()
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install 'beit_dist[heif]'")
    raw = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30))).save(raw)
    assert by_content(raw.getvalue()[:64]) == "image"
    image = images.decode(raw.getvalue())
    assert image.size == (64, 48)
    assert abs(image.getpixel((9, 9))[0] - 200) < 8  # type: ignore[index, operator]


def test_a_folder_of_tars_stands_for_them_unless_images_or_folders_lie_beside_them(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in "ba":
        os.rename(in_tar(write(tmp_path / name, {f"{name}.jpg": PHOTO})), tars / f"{name}.tar")
    write(tars, {"README.txt": b"", ".hidden/c.jpg": PHOTO})
    assert listed(str(tars)) == listed(f"{tars}/{{a,b}}.tar") == (["a.jpg", "b.jpg"], [])
    write(tars, {"d.jpg": PHOTO})
    names, lines = listed(str(tars))
    assert names == ["d.jpg"]
    assert any(line.startswith("2 .tar left out") for line in lines)
    os.remove(tars / "d.jpg")
    write(tars, {"class/d.jpg": PHOTO})
    assert listed(str(tars))[0] == ["class/d.jpg"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", ".heic: pip install pillow-heif", id="heic"),
        pytest.param(b"\0\0\0\x0cJXL \r\n\x87\n", ".jxl: convert them to JPEG or PNG", id="jxl"),
        pytest.param(POINTER, "Git LFS pointer: fetch the files themselves: git lfs pull", id="pointer"),
        pytest.param(b"%PDF-1.7", ".pdf", id="pdf"),
        pytest.param(
            b"\0\0\0\x1cftypavif\0\0\0\0mif1miaf", "it is AVIF, which this build of Pillow lacks", id="avif"
        ),
        pytest.param(b"RIFF\0\0\0\0WEBPVP8 ", "it is WEBP, which this build of Pillow lacks", id="webp"),
    ],
)
def test_what_is_named_like_an_image_and_cannot_be_read_is_called_what_it_is(
    raw: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_formats", lambda: ["JPEG", "PNG", "TIFF"])
    with pytest.raises(ImageRejectedError) as caught:
        images.decode(raw + bytes(3000))
    assert str(caught.value).startswith(f"not an image that Pillow reads: {reason}")
    assert caught.value.kind == "not_an_image"


@everywhere
def test_pointers_of_git_lfs_are_named(tmp_path: Path, where: Where) -> None:
    folder = write(tmp_path / "in", {"a.jpg": POINTER, "b.jpg": PHOTO, "c": POINTER})
    assert listed(where(folder)) == (
        ["b.jpg"],
        ["2 Git LFS pointers left out (a.jpg): fetch the files themselves: git lfs pull"],
    )
    (folder / "b.jpg").write_bytes(POINTER)
    with pytest.raises(DataError, match="no image found: 3 Git LFS pointers left out"):
        listed(where(folder))
    (tmp_path / "p.tar").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"this file is a Git LFS pointer.*git lfs pull"):
        listed(str(tmp_path / "p.tar"))


@everywhere
def test_folders_of_file_servers_are_left_out_and_counted(tmp_path: Path, where: Where) -> None:
    names = [
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg",
        "b/@eadir/c.jpg",
        "#recycle/d.jpg",
        "lost+found/e.jpg",
        "._f.jpg",
    ]
    folder = write(tmp_path / "in", dict.fromkeys([*names, "b/.g/h.jpg", "Thumbs.db"], PHOTO))
    lines = (
        "2 @eaDir folders, 1 #recycle folder, 1 .db, 1 hidden file, 1 hidden folder, 1 lost+found folder left out"
    )
    with pytest.raises(DataError, match=rf"no image found: {lines.replace('+', '.')}"):
        listed(where(folder))
    write(folder, {"b/a.jpg": PHOTO})
    assert listed(where(folder)) == (["b/a.jpg"], [lines])


def test_a_folder_that_may_not_be_listed_is_named_but_for_lost_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"a.jpg": PHOTO, "lost+found/x": b"", "b/b.jpg": PHOTO})
    original = os.scandir

    def refusing(path: str) -> Any:
        if path.endswith(("lost+found", refused)):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refused = "nothing"
    assert listed(str(tmp_path)) == (["a.jpg", "b/b.jpg"], ["1 lost+found folder left out (lost+found)"])
    refused = "b"
    with pytest.raises(DataError, match="/b: cannot be listed"):
        listed(str(tmp_path))


def test_a_hub_cache_is_named_and_its_snapshot_is_read(tmp_path: Path) -> None:
    cache = write(tmp_path / "hub/models--a--b", {"blobs/abc": PHOTO, "refs/main": b"1"})
    snapshot = cache / "snapshots" / ("0a" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "x.jpg").symlink_to("../../blobs/abc")
    (cache / "snapshots/.DS_Store").touch()
    for path in (tmp_path / "hub", cache):
        with pytest.raises(DataError, match=r"1 Hugging Face cache left out .*: name a folder of its snapshots/"):
            listed(str(path))
    assert listed(str(snapshot)) == (["x.jpg"], [])


def test_folders_that_lead_to_one_folder_are_both_kept_and_circles_end(tmp_path: Path) -> None:
    write(tmp_path, {"real/a.jpg": PHOTO})
    (tmp_path / "real/back").symlink_to("..")
    (tmp_path / "in").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).symlink_to("../real")
    found, lines = listed(str(tmp_path / "in"))
    assert found == ["cat/a.jpg", "dog/a.jpg"]
    assert lines == ["4 links to folders that contain them left out (cat/back/in)"]


def test_links_that_multiply_without_end_are_refused(tmp_path: Path) -> None:
    for one in "abcdefgh":
        (tmp_path / one).mkdir()
        for other in "abcdefgh":
            (tmp_path / one / f"to-{other}").symlink_to(f"../{other}")
    with pytest.raises(DataError, match="more than 1000 chains of links lead here"):
        listed(str(tmp_path))


TOKENIZER = save({"x": torch.zeros(1)}, {FORMAT: "{}"})
OWN = {
    "t.safetensors": TOKENIZER,
    "t.png": PHOTO,
    "odd.name": TOKENIZER,
    "odd.png": PHOTO,
    **{f"deep/run/{name}": b"" for name in ("config.yaml", "run.json", "checkpoints/s/manifest.json")},
    "deep/run/pictures/step-00000002.png": PHOTO,
    "deep/run/sheet.png": PHOTO,
    **{f"shards/{name}": b"" for name in ("sources.jsonl", "job.json", "v00/shard-000000.tar")},
    "shards/report.png": PHOTO,
    **{f"copied/{name}": b"" for name in ("manifest.json", "v00/shard-000000.tar")},
    "copied/report.png": PHOTO,
}


@everywhere
def test_what_we_have_written_among_images_is_no_image(tmp_path: Path, where: Where) -> None:
    folder = write(
        tmp_path / "in", {"a.png": PHOTO, "b/v00/c.png": PHOTO, "d/run.json": b"", "d/pictures/e.png": PHOTO} | OWN
    )
    assert listed(where(folder)) == (
        ["a.png", "b/v00/c.png", "d/pictures/e.png"],
        ["2 data sets of shards, 2 tokenizers' pictures, 1 .json, 1 .name, 1 .safetensors, 1 run folder left out"],
    )


@everywhere
@pytest.mark.parametrize("sniff", [False, True])
def test_images_with_weights_or_lists_of_their_own_are_images(tmp_path: Path, where: Where, sniff: bool) -> None:
    """Latents or embeddings beside each image; a list of where the images come from."""
    latents = save({"latent": torch.zeros(2)}, {"format": "pt"})
    files = {"a.png": PHOTO, "a.safetensors": latents, "b.png": PHOTO, "b.safetensors": b"", "c/d.png": PHOTO}
    files |= {"c/sources.jsonl": b"", "c/run.json": b"", "e.latent": latents, "e.png": PHOTO}
    found, lines = listed(where(write(tmp_path / "in", files)), sniff)
    assert found == ["a.png", "b.png", "c/d.png", "e.png"]
    assert "tokenizer" not in str(lines)


def test_pictures_beside_tokenizers_at_urls_are_kept_unless_the_weights_are_read(tmp_path: Path) -> None:
    place = at_url(write(tmp_path, {"t.png": PHOTO, "t.safetensors": TOKENIZER}))
    assert listed(place, sniff=False)[0] == ["t.png"]
    with pytest.raises(DataError, match="1 tokenizer's picture"):
        listed(place, sniff=True)


def test_a_pipe_named_like_weights_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, {"t.png": PHOTO})
    os.mkfifo(tmp_path / "t.safetensors")
    assert listed(str(tmp_path))[0] == ["t.png"]


@everywhere
def test_images_in_a_run_folder_or_among_shards_are_found(tmp_path: Path, where: Where) -> None:
    run = write(tmp_path / "run", {"config.yaml": b"", "run.json": b"", "pictures/s.png": PHOTO, "a/b.png": PHOTO})
    assert listed(where(run)) == (["a/b.png"], ["1 .json, 1 .yaml, 1 folder of a run left out"])
    shards = write(tmp_path / "data", {"sources.jsonl": b"", "v00/shard-000000.tar": b"", "v01/a.png": PHOTO})
    assert listed(where(shards)) == (["v01/a.png"], ["1 .jsonl left out"])
