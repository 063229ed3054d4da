"""Every block of the pages on loaded models runs, from top to bottom, and so does the README's as printed."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.torchvision_stub import stand_in_for_torchvision

from beit_dist.commands.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r'"([\w./-]+\.(?:jpg|png))"')


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language, text and line of each block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(found[1], found[2], text.count("\n", 0, found.start(2))) for found in BLOCK.finditer(text)]


def photograph(path: Path, number: int) -> None:
    """Noise, larger than the model's images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (60, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def run(language: str, text: str, names: dict[str, Any], where: str, line: int) -> None:
    """What a reader who copies the block does."""
    if language == "python":
        exec(compile("\n" * line + text, where, "exec"), names)
        return
    assert language == "sh", f"{where}, line {line}: who runs {language}?"
    for command in text.splitlines():
        beit, *words = shlex.split(command, comments=True)
        assert (beit, main(words)) == ("beit", 0), command


@pytest.fixture
def desk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Path, pretrained: Path, classes: Path, segments: Path
) -> Path:
    """A working directory with the runs and the images that the page names."""
    (tmp_path / "runs").mkdir()
    for name, folder in {"mine": pretrained, "classes": classes, "segments": segments}.items():
        (tmp_path / "runs" / name).symlink_to(folder)
    (tmp_path / "labelled").mkdir()
    (tmp_path / "labelled" / "train").symlink_to(runs / "train")
    (tmp_path / "labelled" / "val").symlink_to(runs / "test")
    (tmp_path / "scenes" / "images").mkdir(parents=True)
    (tmp_path / "scenes" / "images" / "val").symlink_to(runs / "images" / "test")
    for number, name in enumerate(("cat", "dog")):
        photograph(tmp_path / "photos" / f"{name}.jpg", number)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_page_runs(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("transformers", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install {package}")
    page, names = REPOSITORY / "docs" / "use-a-backbone.md", {"__name__": "page"}
    found = blocks(page)
    assert len(found) > 15
    for language, text, line in found:
        if "import timm" in text:
            stand_in_for_torchvision(monkeypatch)  # which timm imports for data only
        run(language, text, names, page.name, line)
    assert (desk / "masked.png").exists()
    assert "% right" in capsys.readouterr().out


def test_every_block_of_the_page_on_many_images_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow", reason="pip install 'beit_dist[parquet]'")
    page, names = REPOSITORY / "docs" / "many-images.md", {"__name__": "page"}
    found = blocks(page)
    assert len(found) == 6
    for language, text, line in found:
        run(language, text, names, page.name, line)
    assert len(names["nearest"]) == 8
    assert {path.stem for path in (desk / "predicted" / "overlays").iterdir()} == {"cat", "dog"}
    assert "duplicate" in capsys.readouterr().out


def test_the_blocks_of_the_readme_run_as_printed(desk: Path) -> None:
    of_readme = blocks(REPOSITORY / "README.md")
    first = next(place for place, block in enumerate(of_readme) if "beit_dist.load(" in block[1])
    for number, name in enumerate(IMAGE.findall(of_readme[first][1])):
        photograph(Path(name), number)
    for language, text, line in of_readme[first : first + 2]:
        run(language, text, {}, "README.md", line)
    made = {path.name for path in desk.iterdir() if path.is_file()}
    assert made >= {"similar.png", "features.npz", "predictions.csv", "report.html"}
