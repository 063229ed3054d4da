"""The generated corpus is reproducible, labelled, and complete or recognisably not."""

import json

import numpy as np
import pytest
from PIL import Image

from beit_dist.data.corpus.render import Camera, Convex, Ellipsoid, Frustum
from beit_dist.data.corpus.scene import LABELS, draw_scene
from beit_dist.data.corpus.writer import CLASSES, picture_path, write_corpus
from beit_dist.errors import ConfigError, DataError


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
    ("settings", "field"), [({"images": 0}, "images"), ({"size": 8}, "size"), ({"seed": -1}, "seed")]
)
def test_numbers_out_of_range_are_refused(tmp_path, settings, field):
    with pytest.raises(ConfigError, match=f"--{field}"):
        write_corpus(tmp_path, **({"images": 2, "size": 16} | settings))


CUBE = Convex(
    (0.2, 0.5, 4.0),
    ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)),
    (0.5,) * 6,
    0.9,
    turn=0.4,
)


@pytest.mark.parametrize(
    "solid",
    [
        Ellipsoid((0.3, 1.0, 4.0), (0.5, 0.9, 0.4)),
        Frustum((-0.2, 0.0, 3.0), 1.4, 0.5, 0.2),
        Frustum((0.1, 0.3, 3.0), 0.8, 0.6, 0.0),
        CUBE,
    ],
)
def test_solids_are_hit_inside_their_bounds_and_their_window_facing_the_ray(solid):
    camera, side = Camera(1.2, 0.1, 0.6), 64
    rays = camera.rays(side)
    t = solid.hit((0.0, camera.height, 0.0), rays)
    rows, columns = np.nonzero(t < 1e6)
    assert rows.size > 50
    window = camera.window(*solid.bounds, side)
    assert rows.min() >= window[0].start
    assert rows.max() < window[0].stop
    assert columns.min() >= window[1].start
    assert columns.max() < window[1].stop
    direction = np.stack([axis[rows, columns] for axis in rays], axis=1)
    points = direction * t[rows, columns, None] + np.float32((0, camera.height, 0))
    centre, radius = solid.bounds
    assert np.linalg.norm(points - np.float32(centre), axis=1).max() < radius * 1.001
    _, normals = solid.surface(points)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-4)
    assert np.mean(np.sum(normals * direction, axis=1) < 1e-2) > 0.98
