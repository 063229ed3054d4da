"""``beit predict`` writes what the model says of each image, in every form, and label maps as the run's own."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.archives import picture, tar_of
from support.mixed_images import ODD, Mixed
from support.together import together

from beit_dist.commands.predict import job_of, main, parser
from beit_dist.errors import ConfigError, DataError
from beit_dist.images.decoding import decode
from beit_dist.images.files import find_images
from beit_dist.images.labelled.reading import read_map
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.loading import load
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.storage.access import Access


def words(run: Path, sources: list[str], out: Path, *more: str) -> list[str]:
    return [str(run), "--images", *sources, "--out", str(out), "--device", "cpu", *more]


@pytest.fixture(scope="module")
def guesses(classes: Path, mixed: Mixed) -> list[list[tuple[str, float]]]:
    """What the model says of each readable image."""
    model = load(classes)
    assert isinstance(model, ClassificationModel)
    found = model.predict([decode(raw) for _, _, _, raw in mixed.good], top=2)
    return [[(guess.name, guess.probability) for guess in each] for each in found]


def check(rows: list[Any], guesses: list[list[tuple[str, float]]]) -> None:
    """``rows``: class and probability, twice, of each image."""
    for row, ((first, high), (second, low)) in zip(rows, guesses, strict=True):
        assert (row[0], row[2]) == (first, second)
        assert (float(row[1]), float(row[3])) == (pytest.approx(high, abs=1e-5), pytest.approx(low, abs=1e-5))


def test_all_forms_have_the_classes_and_probabilities_of_the_model(
    classes: Path, mixed: Mixed, tmp_path: Path, guesses: list[list[tuple[str, float]]]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'beit_dist[parquet]'")
    for suffix in ("csv", "json", "parquet"):
        assert main(words(classes, mixed.sources, tmp_path / f"p.{suffix}", "--top", "2")) == 0
        lost = list(csv.reader(io.StringIO((tmp_path / f"p.{suffix}.unreadable.csv").read_text(), newline="")))
        assert [tuple(row[:2]) for row in lost[1:]] == mixed.bad
    keys = [row[:3] for row in mixed.good]
    head, *rows = csv.reader(io.StringIO((tmp_path / "p.csv").read_text(), newline=""))
    assert head == ["source", "name", "label", "class_1", "probability_1", "class_2", "probability_2"]
    assert [tuple(row[:3]) for row in rows] == keys
    assert ODD in [row[1] for row in rows]
    check([row[3:] for row in rows], guesses)
    images = json.loads((tmp_path / "p.json").read_text())["images"]
    assert [(each["source"], each["name"], each["label"]) for each in images] == keys
    check([[value for one in each["classes"] for value in one.values()] for each in images], guesses)
    table = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [tuple(row.values())[:3] for row in table] == keys
    check([list(row.values())[3:] for row in table], guesses)
    facts = [json.loads((tmp_path / "p.json").read_text())["metadata"]]
    facts.append(json.loads((tmp_path / "p.csv.metadata.json").read_text()))
    assert facts[0] == facts[1]
    assert facts[0]["facts"]["classes"] == ["amber", "blue", "green"]


def test_predictions_of_other_settings_are_not_replaced(classes: Path, mixed: Mixed, tmp_path: Path) -> None:
    for suffix in ("csv", "json"):
        out = tmp_path / f"p.{suffix}"
        assert main(words(classes, mixed.sources[:1], out)) == 0
        assert main(words(classes, mixed.sources[:1], out)) == 0
        with pytest.raises(ConfigError, match="holds predictions of other top"):
            main(words(classes, mixed.sources[:1], out, "--top", "1"))
    (tmp_path / "p.csv.metadata.json").unlink()
    with pytest.raises(ConfigError, match="this one is there, and is not of this command"):
        main(words(classes, mixed.sources[:1], out.with_suffix(".csv")))


def test_label_maps_are_the_models_with_the_numbers_of_the_runs_maps(
    segments: Path, mixed: Mixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predicted"
    assert main(words(segments, mixed.sources[1:], out, "--overlays")) == 0
    model = load(segments)
    assert isinstance(model, SegmentationModel)
    good = [row for row in mixed.good if row[0] != mixed.sources[0]]
    index = json.loads((out / "predictions.json").read_text())
    assert [(each["source"], each["name"]) for each in index["images"]] == [row[:2] for row in good]
    meanings = index["metadata"]["facts"]["classes"]
    assert [(each["id"], each["class"]) for each in meanings] == [(0, "red"), (1, "green"), (2, "blue")]
    files = {file.name: file for file in find_images(str(out / "maps"))}
    assert len(files) == len(good) == 27
    for (_, name, _, raw), told in zip(good, index["images"], strict=True):
        (expected,) = model.predict([decode(raw)])
        own = name.rpartition(".")[0].replace("\\udcff", "\udcff") + ".png"
        np.testing.assert_array_equal(read_map(files[own], Access()), expected.labels)
        shares = {each["class"]: each["share"] for each in told["classes"]}
        assert shares == pytest.approx(expected.shares, abs=1e-6)
    painted = Image.open(out / "maps" / "f" / "3.png")
    colours = {bytes.fromhex(each["colour"][1:]) for each in meanings}
    assert {bytes(pixel) for pixel in np.asarray(painted.convert("RGB")).reshape(-1, 3)} <= colours
    overlay = np.asarray(Image.open(out / "overlays" / "f" / "3.png")).astype(int)
    image = np.asarray(decode(next(row[3] for row in good if row[1] == "f/3.png"))).astype(int)
    assert np.abs(2 * overlay - image - np.asarray(painted.convert("RGB"))).max() <= 1
    assert "3 images cannot be read" in capsys.readouterr().out


def test_maps_have_the_numbers_that_the_recipe_gives_its_first_class(segments: Path, mixed: Mixed) -> None:
    from beit_dist.inference.collection import find_collection
    from beit_dist.inference.label_map_files import map_file
    from beit_dist.inference.segmenting import Segmenting, Wishes
    from beit_dist.storage.opening import open_place

    model = load(segments)
    assert isinstance(model, SegmentationModel)
    work = Segmenting(model, find_collection(mixed.sources[:1], Access()), open_place("x"), Wishes())
    assert work.first == 0
    recipe = model.provenance.recipe
    assert recipe is not None
    recipe["maps"]["ids"] = [1, 3]
    assert work.first == 1
    labels = np.array([[0, 1, 2]], np.uint8)
    for first, mode in ((1, "P"), (253, "P"), (254, "I;16")):
        image = Image.open(io.BytesIO(map_file(labels, first, 3)))
        assert image.mode == mode
        assert np.asarray(image).tolist() == [[first, first + 1, first + 2]]


def test_two_ranks_and_a_second_start_give_the_same_maps(segments: Path, mixed: Mixed, tmp_path: Path) -> None:
    def made(out: Path, world: int) -> dict[str, bytes]:
        def one(agreement: Any) -> int:
            job = job_of(parser().parse(words(segments, mixed.sources[2:], out, "--quick")))
            return job.run(agreement, torch.device("cpu"), lambda images: None)

        together(world, one)
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    alone = made(tmp_path / "1", 1)
    assert made(tmp_path / "2", 2) == alone
    assert made(tmp_path / "2", 1) == alone
    assert len(alone) == 7


def test_maps_that_would_lie_on_one_another_or_elsewhere_are_refused(segments: Path, tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    for names, said in (
        (["a.jpg", "a.png"], "a.jpg.* and .*a.png would have the same map, a.png"),
        (["../a.jpg"], "its map would lie outside --out"),
        (["/a.jpg"], "its map would lie outside --out"),
    ):
        tar.write_bytes(tar_of({name: picture(0) for name in names}))
        with pytest.raises(DataError, match=said):
            main(words(segments, [str(tar)], tmp_path / "out"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(picture(0))
    with pytest.raises(ConfigError, match=r"--out: got .*, expected a folder outside of --images"):
        main(words(segments, [str(tmp_path / "in")], tmp_path / "in" / "maps"))


def test_what_does_not_suit_the_model_is_refused(
    pretrained: Path, classes: Path, segments: Path, mixed: Mixed, tmp_path: Path
) -> None:
    for run, out, more, said in (
        (pretrained, "p.csv", [], "RUN: got .*expected a model that was fine-tuned"),
        (classes, "folder", [], "--out: got .*expected a file that ends in .json, .csv or .parquet"),
        (classes, "p.npz", [], "--out: got .*expected a file that ends in .json, .csv or .parquet"),
        (classes, "p.csv", ["--overlays"], "--overlays: got .*, expected a segmentation"),
        (classes, "p.csv", ["--quick"], "--quick: got .*, expected a segmentation"),
        (segments, "p.csv", [], "--out: got .*, expected a folder, for the label maps"),
    ):
        with pytest.raises(ConfigError, match=said):
            main(words(run, mixed.sources, tmp_path / out, *more))
