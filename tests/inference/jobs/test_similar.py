"""``beit similar`` finds what comparing each pair would find, in images and in files of features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.mixed_images import Mixed

from beit_dist.commands.embed import main as embed
from beit_dist.commands.similar import main
from beit_dist.errors import ConfigError, DataError
from beit_dist.images.decoding import decode
from beit_dist.inference.loading import load
from beit_dist.inference.nearest import nearest


@pytest.fixture(scope="module")
def queries(mixed: Mixed, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Copies of two of the images, one in the zip and one in the tar."""
    folder = tmp_path_factory.mktemp("queries")
    for number in (3, 20):
        (folder / f"{number}.img").write_bytes(mixed.good[number][3])
    return [str(folder / "3.img"), str(folder / "20.img")]


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What the command says as JSON."""
    assert main([*words, "--device", "cpu", "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_nearest_rows_are_those_of_all_cosines_and_of_equals_the_earlier() -> None:
    random = np.random.default_rng(0)
    rows, queries = random.normal(size=(50, 8)).astype(np.float32), random.normal(size=(3, 8)).astype(np.float32)
    rows[40] = 3 * rows[7]
    rows[8] = 0
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ unit.T
    blocks = [rows[:1], rows[1:30], rows[30:30], rows[30:]]
    found = nearest(queries, blocks, 10)
    for own, expected in zip(found, cosines, strict=True):
        order = np.argsort(-expected, kind="stable")[:10]
        assert [each.row for each in own] == order.tolist()
        np.testing.assert_allclose([each.cosine for each in own], expected[order], atol=1e-6)
    (equal,) = nearest(2 * rows[7:8], blocks, 2)
    assert [each.row for each in equal] == [7, 40]
    assert all(each.is_duplicate for each in equal)
    assert [len(each) for each in nearest(queries, blocks, 99)] == [50] * 3


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_images_and_a_file_of_their_features_give_the_same_answer(
    pretrained: Path,
    mixed: Mixed,
    queries: list[str],
    tmp_path: Path,
    suffix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="pip install 'beit_dist[parquet]'")
    file, sheet = str(tmp_path / f"f.{suffix}"), str(tmp_path / "s.png")
    embed([str(pretrained), "--images", *mixed.sources, "--out", file, "--device", "cpu", "--token", "both"])
    capsys.readouterr()
    now = asked(capsys, str(pretrained), *queries, "--images", *mixed.sources, "--out", sheet, "--top", "4")
    first = Path(sheet).read_bytes()
    then = asked(capsys, str(pretrained), *queries, "--embedded", file, "--out", sheet, "--top", "4")
    assert now == then
    assert Path(sheet).read_bytes() == first  # whose images were found again in zip, tar and folder
    features = load(pretrained).features([decode(raw) for _, _, _, raw in mixed.good]).patch_mean.numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for number, query, answer in zip((3, 20), queries, now, strict=True):
        assert answer["query"] == query
        cosines = unit @ unit[number]
        assert [each["cosine"] for each in answer["similar"]] == pytest.approx(np.sort(cosines)[:-5:-1], abs=1e-5)
        best = answer["similar"][0]
        assert (best["source"], best["name"], best["label"]) == mixed.good[number][:3]
        assert best["duplicate"]
        assert best["cosine"] == pytest.approx(1)


def test_the_sheet_shows_the_query_and_marks_duplicates(
    pretrained: Path, mixed: Mixed, queries: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "s.png"
    words = [str(pretrained), *queries, "--images", *mixed.sources, "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == queries[0]
    assert shown[1].startswith("   1  1.000  ")
    assert "duplicate" in shown[1]
    assert "3 of 42 images cannot be read and were left out" in shown
    pixels = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3)
    blue, orange = (np.count_nonzero((pixels == colour).all(1)) for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)))
    assert min(blue, orange) > 500  # the frames of two queries, and of the two images that they are copies of


def test_images_that_have_gone_since_are_told_and_not_drawn(
    pretrained: Path, mixed: Mixed, queries: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (_, _, _, raw) in enumerate(mixed.good[:4]):
        (folder / f"{number}.png").write_bytes(raw)
    file, sheet = str(tmp_path / "f.npz"), str(tmp_path / "s.png")
    embed([str(pretrained), "--images", str(folder), "--out", file, "--device", "cpu"])
    (folder / "3.png").unlink()
    capsys.readouterr()
    answer = asked(capsys, str(pretrained), queries[0], "--embedded", file, "--out", sheet)
    assert answer[0]["similar"][0]["name"] == "3.png"
    assert len(answer[0]["similar"]) == 4


def test_what_cannot_be_compared_is_refused(
    pretrained: Path, classes: Path, mixed: Mixed, queries: list[str], tmp_path: Path
) -> None:
    file, other = tmp_path / "f.npz", tmp_path / "other.npz"
    embed([str(pretrained), "--images", *mixed.sources, "--out", str(file), "--device", "cpu"])
    other.write_bytes(b"mine")
    for run, words, said in (
        (pretrained, [], "--images: got None, expected either --images SRC or --embedded F"),
        (pretrained, ["--images", "x", "--embedded", "y"], "--images: got 'both'"),
        (classes, ["--embedded", str(file)], "--embedded: .*other weights.*Name the model that made it"),
        (
            pretrained,
            ["--embedded", str(file), "--token", "class"],
            r"expected features class_2 \(it has mean_2\)",
        ),
        (pretrained, ["--embedded", str(file), "--layer", "9"], "--layer: got 9"),
        (pretrained, ["--embedded", str(tmp_path / "no.npz")], "there is none of that name"),
        (pretrained, ["--embedded", str(other)], "this one is not, or is damaged"),
        (pretrained, ["--embedded", "f.csv"], "--embedded: got 'f.csv', expected a file of beit embed"),
        (
            pretrained,
            ["--embedded", str(file), "--out", f"{other}/s.png"],
            "a file that can be written .*directory",
        ),
        (pretrained, ["--embedded", str(file), "--out", "s.jpg"], "--out: got 's.jpg', expected a file that ends"),
    ):
        with pytest.raises(ConfigError, match=said):
            main([str(run), queries[0], "--out", str(tmp_path / "s.png"), "--device", "cpu", *words])
    with pytest.raises(DataError, match=r"none\.img"):
        main(
            [
                str(pretrained),
                str(tmp_path / "none.img"),
                "--embedded",
                str(file),
                "--out",
                str(tmp_path / "s.png"),
            ]
        )
