"""What a page finds beside curves: settings, time, probes, colours; and damage stops no part but its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from support.reported import make_run, steps_of, subjects

from beit_dist.errors import DataError
from beit_dist.reports.html.attention import heated, interesting
from beit_dist.reports.html.data import bars_of, in_bytes
from beit_dist.reports.html.embedded import enlarged, outlined
from beit_dist.reports.html.label_maps import overlaid, palette_of
from beit_dist.reports.html.predictions import most_confused
from beit_dist.reports.html.probes import Probes, probe_charts, probes_of
from beit_dist.reports.html.section import Missing, section_of
from beit_dist.reports.html.settings import settings_of
from beit_dist.reports.html.subject import Subject
from beit_dist.reports.html.timing import Timing, timing_of


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (DataError("the data is gone"), "the data is gone"),
        (FileNotFoundError("no file"), "no file"),
        (IndexError("out of range"), "IndexError: out of range"),
    ],
)
def test_a_part_that_fails_is_left_out_alone(
    tmp_path: Path, error: Exception, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    def find(run: Subject) -> str | Missing:
        if run.number:
            raise error
        return "found"

    with caplog.at_level(logging.ERROR):
        section = section_of(subjects(make_run(tmp_path / "a"), make_run(tmp_path / "b")), lambda _: True, find)
    assert [part.content for part in section.parts] == ["found"]
    assert [(run.name, said) for run, said in section.left_out] == [("b", why)]
    assert bool(caplog.records) == isinstance(error, IndexError)  # what nobody foresaw is told with a traceback


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.jsonl", "validation.jsonl"])
@pytest.mark.parametrize("content", [b"{\n", b"[]\n", b"\xff\x00\n", b'{"step": 1}\n{"loss": []}\n{"step": 3}'])
def test_a_damaged_file_is_named_and_the_run_opened_all_the_same(
    tmp_path: Path, name: str, content: bytes
) -> None:
    folder = make_run(tmp_path / "r", steps=steps_of(3), measured=[{"step": 3, "loss": 1.0}])
    (folder / name).write_bytes(content)
    (run,) = subjects(folder)
    assert any(name in each for each in run.damage)


def test_settings_that_differ_are_told_and_the_folder_is_none(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", recipe={"optimizer": {"lr": 1e-3}, "run": "a"})
    other = make_run(tmp_path / "b", recipe={"optimizer": {"lr": 2e-3}, "run": "b"})
    found = settings_of(subjects(one, other))
    assert found.rows == (("optimizer.lr", ("0.001", "0.002")),)
    assert found.columns == ("a", "b")


def test_of_one_run_the_settings_that_are_no_defaults_are_told(tmp_path: Path) -> None:
    found = settings_of(subjects(make_run(tmp_path / "a", recipe={"global_batch": 48})))
    assert ("global_batch", ("48", "2048")) in found.rows
    assert not any(name == "seed" for name, _ in found.rows)
    assert len(found.rows) + found.same == len(found.all[0][1])


def test_time_is_divided_among_steps_waits_measurements_and_the_rest(tmp_path: Path) -> None:
    first = steps_of(5)
    second = [{**line, "attempt": 2, "time": line["time"] + 100.0} for line in steps_of(10)[5:]]
    for line in second[3:]:
        line["time"] += 7.0  # a save, or something else that was no step
    folder = make_run(
        tmp_path / "r", steps=first + second, measured=[{"step": 10, "loss": 1.0, "seconds": 3.0, "attempt": 2}]
    )
    found = timing_of(subjects(folder)[0])
    assert isinstance(found, Timing)
    seconds = {share.name: round(share.seconds, 6) for share in found.shares}
    assert seconds == {
        "steps": 18.0,
        "waiting for data": 2.0,
        "measurements on held-out data": 3.0,
        "saves and all else": 4.0,
    }
    assert [(start.first, start.last, start.images_per_second) for start in found.starts] == [
        (1, 5, "4"),
        (6, 10, "4"),
    ]


PROBE = {"linear": {"test": 0.5, "choice": 0.4, "l2": 1.0}, "knn": {"test": 0.25, "choice": 0.2}}


def test_a_probe_beside_the_run_comes_before_one_in_training(tmp_path: Path) -> None:
    layers = [{"layer": layer, **PROBE} for layer in (1, 2)]
    line = {"step": 3, "probe_linear": 0.5, "probe_knn": 0.2, "probe_layers": layers[:1]}
    folder = make_run(tmp_path / "r", steps=steps_of(3), measured=[line])
    (run,) = subjects(folder)
    found = probes_of(run)
    assert isinstance(found, Probes)
    assert (found.layers, found.source) == ((1,), "measured in training, at step 3")
    (folder / "probe.json").write_text(json.dumps({"model": "m", "layers": layers, "commonest_class": 0.1}))
    found = probes_of(run)
    assert isinstance(found, Probes)
    assert (found.layers, found.scores["linear"], found.commonest) == ((1, 2), (50.0, 50.0), 10.0)
    assert [chart.title for chart in probe_charts([(run, found)])] == [
        "Linear classifier",
        "20 nearest neighbours",
    ]


def test_without_a_probe_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    found = probes_of(subjects(make_run(tmp_path / "r", steps=steps_of(3)))[0])
    assert isinstance(found, Missing)
    assert "beit probe RUN" in found.why


def test_of_many_classes_those_that_are_confused_most_are_in_the_matrix() -> None:
    confusion = np.diag(np.full(100, 5))
    confusion[70, 3] = 4
    confusion[11, 90] = 2
    found = most_confused(confusion)
    assert len(found) == 20
    assert found == sorted(found)
    assert {3, 11, 70, 90} <= set(found)


def test_colours_of_classes_differ_however_many_there_are() -> None:
    assert len({tuple(colour) for colour in palette_of(255)}) == 255
    assert (palette_of(255)[:20] == palette_of(20)).all()


def test_pixels_without_a_class_stay_grey() -> None:
    pixels = np.full((2, 2, 3), (10, 20, 30), np.uint8)
    drawn = overlaid(pixels, np.array([[0, 255], [1, 0]], np.uint8), palette_of(2))
    assert (drawn[0, 1] == 20).all()
    assert (drawn[0, 0] == drawn[1, 1]).all()
    assert (drawn[0, 0] != drawn[1, 0]).any()


def test_the_queries_are_the_patches_of_most_contrast_one_in_each_quarter() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    for row, column in ((2, 1), (1, 6), (6, 2), (5, 6)):
        pixels[8 * row : 8 * row + 4, 8 * column : 8 * column + 8] = 255
    assert sorted(interesting(pixels, 8)) == [(1, 6), (2, 1), (5, 6), (6, 2)]


def test_a_map_is_brightest_where_most_attention_is() -> None:
    weights = np.zeros((4, 4), np.float32)
    weights[3, 0] = 1
    drawn = heated(np.zeros((64, 64, 3), np.uint8), weights).astype(int).sum(2)
    assert np.unravel_index(drawn.argmax(), drawn.shape)[0] >= 48
    assert drawn[48:, :16].mean() > 4 * drawn[:32, 32:].mean()


def test_the_line_around_masked_patches_touches_nothing_else() -> None:
    pixels = np.full((16, 16, 3), 100, np.uint8)
    hidden = np.zeros((4, 4), np.bool_)
    hidden[1:3, 1:3] = True
    drawn = outlined(pixels, hidden)
    assert (drawn[4, 4:12] == 255).all()
    assert (drawn[3, 4:12] == 0).all()
    assert (drawn[6:10, 6:10] == 100).all()
    assert (drawn[:2] == 100).all()


def test_small_pictures_are_enlarged_by_whole_factors() -> None:
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    larger = enlarged(pixels, 10)
    assert larger.shape == (9, 9, 3)
    assert (larger[::3, ::3] == pixels).all()
    assert enlarged(np.zeros((300, 20, 3), np.uint8)).shape == (300, 20, 3)


def test_counts_and_bytes_for_people() -> None:
    assert [bar.share for bar in bars_of([("a", 4), ("b", 1)])] == [1.0, 0.25]
    assert [in_bytes(number) for number in (999, 18_500_000, 2.5e12)] == ["999 B", "18.5 MB", "2.5 TB"]
