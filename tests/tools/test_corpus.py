"""The generated corpus is reproducible, labelled, and complete or recognisably not."""

import json

import numpy as np
import pytest
from PIL import Image

from beit_dist.errors import ConfigError, DataError
from corpus.render import Brush, Canvas, Light, Place
from corpus.scene import LABELS, draw_scene
from corpus.writer import CLASSES, picture_path, write_corpus


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_and_another_seed_other_pictures(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_corpus(tmp_path / name, images=4, size=32, seed=seed)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a if name.endswith(".jpg"))


def test_a_larger_corpus_begins_with_the_smaller_and_workers_change_nothing(tmp_path):
    write_corpus(tmp_path / "few", images=3, size=16, seed=1)
    write_corpus(tmp_path / "many", images=130, size=16, seed=1, workers=2)
    few, many = files(tmp_path / "few"), files(tmp_path / "many")
    assert len([name for name in many if name.endswith(".jpg")]) == 130
    assert all(many[name] == raw for name, raw in few.items() if name != "classes.json")


def test_every_image_has_a_label_map_of_its_name_and_size(tmp_path):
    write_corpus(tmp_path, images=20, size=48, seed=0)
    about = json.loads((tmp_path / "classes.json").read_text())
    assert about["classes"] == list(CLASSES)
    assert about["labels"] == list(LABELS)
    images = sorted((tmp_path / "images").rglob("*.jpg"))
    assert len(images) == 20
    for path in images:
        labels = Image.open(tmp_path / "labels" / path.parent.name / f"{path.stem}.png")
        assert Image.open(path).size == labels.size == (48, 48)
        assert np.asarray(labels).max() < len(LABELS)


def test_classes_are_even_and_the_thing_in_front_can_be_seen():
    for picture, name in enumerate(CLASSES):
        labels = np.asarray(draw_scene(0, picture, name, 64)[1])
        assert (labels == LABELS.index(name)).mean() > 0.01, name
    assert [picture_path("x", "images", i).parent.name for i in range(20)] == list(CLASSES) * 2


def test_pictures_differ_in_light_and_colour():
    means = [np.asarray(draw_scene(0, i, "ball", 32)[0]).mean((0, 1)) for i in range(12)]
    assert np.ptp(np.stack(means), axis=0).min() > 40


def test_the_same_corpus_is_kept_and_another_is_not_overwritten(tmp_path):
    assert write_corpus(tmp_path, images=2, size=16)
    before = files(tmp_path)
    assert not write_corpus(tmp_path, images=2, size=16)
    with pytest.raises(DataError, match="holds another corpus"):
        write_corpus(tmp_path, images=3, size=16)
    assert files(tmp_path) == before


def test_an_unfinished_corpus_is_completed(tmp_path):
    write_corpus(tmp_path, images=3, size=16)
    whole = files(tmp_path)
    (tmp_path / "classes.json").unlink()
    picture_path(tmp_path, "images", 1).write_bytes(b"cut short")
    assert write_corpus(tmp_path, images=3, size=16)
    assert files(tmp_path) == whole


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        write_corpus(tmp_path, images=2)
    with pytest.raises(DataError, match="got a file"):
        write_corpus(tmp_path / "thesis.tex", images=2)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"images": 0}, "images"), ({"size": 8}, "size"), ({"seed": -1}, "seed"), ({"workers": -1}, "workers")],
)
def test_numbers_out_of_range_are_refused(tmp_path, settings, field):
    with pytest.raises(ConfigError, match=f"--{field}"):
        write_corpus(tmp_path, **({"images": 2, "size": 16} | settings))


def white(points):
    return np.ones_like(points)


@pytest.fixture
def canvas():
    """An empty picture under a sun behind and above the viewer, to the left."""
    return Canvas(64, 0.5, 0.4, 1.2, Light((-0.48, 0.6, -0.64), (1, 1, 1), (0.3, 0.3, 0.3), (1, 1, 1), 1e6))


def drawn(canvas, part, x=0.0):
    """Rows and columns of what a part covers, two metres tall and four metres away; ``part`` draws it."""
    part(Brush(canvas, Place(x, 4.0, 2.0, ((0, 0, 0), (1, 1, 1)), 7)))
    return np.nonzero(canvas.label == 7)


PARTS = {
    "ball": lambda brush: brush.ball((0, 0.5, 0), (0.3, 0.5, 0.3), white),
    "cone": lambda brush: brush.cone((0, 0, 0), 1, 0.3, 0.1, white),
    "face": lambda brush: brush.face((-0.3, 0, 0), (0.6, 0, 0), (0, 1, 0), white),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_stands_where_perspective_puts_it(canvas, part):
    rows, columns = drawn(canvas, part, x=0.5)
    # One metre is 16 pixels; the foot is 1.2 m below the horizon, which is in row 25.6, and the top 0.8 m above.
    assert abs(rows.min() - (25.6 - 0.8 * 16)) < 2
    assert abs(rows.max() - (25.6 + 1.2 * 16)) < 4
    assert abs(columns.min() - (40 - 0.6 * 16)) < 1.5
    assert abs(columns.max() - (40 + 0.6 * 16)) < 1.5


@pytest.mark.parametrize("name", ["ball", "cone"])
def test_a_round_part_is_brighter_towards_the_sun(canvas, name):
    rows, columns = drawn(canvas, PARTS[name])
    lit = canvas.colour[rows, columns].mean(1)
    assert lit[columns < 28].mean() > 1.3 * lit[columns > 36].mean()


def test_a_face_seen_from_behind_is_not_drawn(canvas):
    rows, _ = drawn(canvas, lambda brush: brush.face((0.3, 0, 0), (-0.6, 0, 0), (0, 1, 0), white))
    assert rows.size == 0


@pytest.mark.parametrize("x", [-9.0, 9.0])
def test_a_part_outside_the_picture_is_not_drawn(canvas, x):
    for part in PARTS.values():
        assert drawn(canvas, part, x)[0].size == 0
