"""The curves of runs: every number beside its baselines, in a picture that can be read."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.legend import Legend
from matplotlib.text import Text
from support.figures import words_of

from beit_dist.models.heads.pixels import PixelsHead
from beit_dist.models.heads.tokens import TokensHead
from beit_dist.reports.curves import Curves, draw_curves
from beit_dist.reports.history import History, Series
from beit_dist.step_numbers import Baseline, KnownBaselines, Number
from beit_dist.tasks.tokenizer.numbers import KNOWN, MEASURED, NUMBERS

BASELINES = KnownBaselines(
    {
        "loss": [Baseline("uniform", 6.238), Baseline("frequency", 4.112)],
        "accuracy": [Baseline("commonest token", 0.0559)],
    }
)


def line(step: int, batch: int = 8, **changed: Any) -> dict[str, Any]:
    own = {"step": step, "samples": step * batch, "loss": 6 - step / 100, "accuracy": step / 1000, "attempt": 1}
    return own | {"lr": 1e-3, "grad_norm": 1.0} | changed


def curves(steps: int = 60, name: str = "mine", baselines: Any = BASELINES, **changed: Any) -> Curves:
    trained = Series([line(step, **changed) for step in range(1, steps + 1)])
    held_out = Series([line(step, loss=5.5, accuracy=0.05) for step in range(20, steps + 1, 20)])
    return Curves(name, History(trained, held_out), TokensHead.numbers, TokensHead.numbers, baselines)


def panels_of(figure: Figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes]


def lines_of(figure: Figure, panel: int) -> dict[str, Any]:
    return {str(line.get_label()): line for line in figure.axes[panel].get_lines()}


def test_loss_and_accuracy_lie_beside_their_baselines(tmp_path: Path, figures: list[Figure]) -> None:
    draw_curves([curves()], tmp_path / "pictures" / "loss.png", "mine")
    loss, accuracy = lines_of(figures[0], 0), lines_of(figures[0], 1)
    assert {loss[name].get_ydata()[0] for name in ("uniform: 6.24", "frequency: 4.11")} == {6.238, 4.112}
    assert accuracy["commonest token: 5.6 %"].get_ydata()[0] == pytest.approx(5.59)
    for panel, value in ((loss, 5.5), (accuracy, 5.0)):
        assert panel["held out"].get_xdata().tolist() == [20, 40, 60]
        assert panel["held out"].get_ydata().tolist() == [value] * 3
        assert len(panel["each step"].get_ydata()) == len(panel["moving average"].get_ydata()) == 60
    assert [axes.get_ylabel() for axes in figures[0].axes] == [
        "loss",
        "accuracy",
        "learning rate",
        "gradient norm",
    ]
    assert imread(tmp_path / "pictures" / "loss.png").std() > 0.01


def test_baselines_that_are_others_on_held_out_data_are_drawn_in_its_colour(
    tmp_path: Path, figures: list[Figure]
) -> None:
    held_out = {"loss": [Baseline("uniform", 6.238), Baseline("frequency", 4.3)]}
    draw_curves([curves(baselines=KnownBaselines(BASELINES.training, held_out))], tmp_path / "loss.png")
    loss = lines_of(figures[0], 0)
    assert loss["frequency, held out: 4.30"].get_color() == loss["held out"].get_color()
    assert loss["frequency, held out: 4.30"].get_ydata()[0] == 4.3
    assert figures[0].axes[0].get_position().x1 > 0.97  # the legend takes no room from the curves
    assert sum("uniform" in label for label in loss) == 1


def test_a_baseline_that_is_not_known_is_no_line_and_the_picture_says_what_to_do(
    tmp_path: Path, figures: list[Figure]
) -> None:
    way_out = "others are unknown: run beit inspect a_{$folder$"
    unknown = KnownBaselines({"loss": [Baseline("uniform", 6.2)]}, unknown=way_out)
    draw_curves([curves(baselines=unknown)], tmp_path / "loss.png")
    assert words_of(figures[0]).count(f"Baselines: {way_out}") == 1
    assert not any(label.startswith("frequency") for label in lines_of(figures[0], 0))
    assert figures[0].axes[0].get_position().width > 0.7  # the text takes no room from the curves


def test_any_kind_of_run_is_drawn_from_the_numbers_that_it_declares(tmp_path: Path, figures: list[Figure]) -> None:
    trained = Series([{"step": step, "loss": 1 / step, "perplexity": 40.0, "lr": 1e-3} for step in (1, 2)])
    held_out = Series([{"step": 2, "psnr": 21.5, "perplexity": 30.0, "used": 99}])
    draw_curves([Curves("t", History(trained, held_out), (*NUMBERS, *KNOWN), MEASURED)], tmp_path / "loss.png")
    assert panels_of(figures[0])[:4] == ["loss", "PSNR (dB)", "perplexity", "tokens in use"]
    assert panels_of(figures[0])[-2:] == ["learning rate", "gradient norm"]
    assert lines_of(figures[0], 1)["held out"].get_ydata().tolist() == [21.5]
    assert {"each step", "held out"} <= set(lines_of(figures[0], 2))
    draw_curves(
        [Curves("p", History(trained, Series([])), PixelsHead.numbers, PixelsHead.numbers)], tmp_path / "p.png"
    )
    assert panels_of(figures[1]) == ["loss", "learning rate", "gradient norm"]
    shares = (Number(name="loss", help="L."), Number(name="accuracy", help="A.", text="top-1 {:.1%}"))
    draw_curves([Curves("f", curves(2).history, shares, shares)], tmp_path / "f.png")
    assert figures[2].axes[1].get_ylabel() == "top-1"
    assert lines_of(figures[2], 1)["each step"].get_ydata().tolist() == pytest.approx([0.1, 0.2])  # in percent


@pytest.mark.parametrize(
    ("starts", "said"), [((8, 30), "resumed at step 8, 30"), ((5, 9, 20, 40), "resumed 4 times")]
)
def test_resumes_are_marked_and_named_once(
    tmp_path: Path, figures: list[Figure], starts: tuple[int, ...], said: str
) -> None:
    rows = [line(step, attempt=1 + sum(step >= start for start in starts)) for step in range(1, 61)]
    run = Curves("r", History(Series(rows), Series([])), TokensHead.numbers)
    draw_curves([run], tmp_path / "loss.png")
    for axes in figures[0].axes:
        marked = [mark.get_xdata()[0] for mark in axes.get_lines() if str(mark.get_label()).startswith("resumed")]
        assert marked == list(starts)
    assert words_of(figures[0]).count(said) == 1


def test_steps_that_were_not_finite_are_marked_and_leave_a_gap(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [line(step, **({"loss": None, "grad_norm": None} if 30 < step <= 40 else {})) for step in range(1, 61)]
    draw_curves([Curves("n", History(Series(rows), Series([])), TokensHead.numbers)], tmp_path / "loss.png")
    found = lines_of(figures[0], 0)
    assert found["not finite: 10 steps"].get_xdata().tolist() == list(range(31, 41))
    assert np.isnan(found["each step"].get_ydata()[30:40]).all()
    nothing = [line(step, loss=None, accuracy=None, grad_norm=None) for step in (1, 2)]
    draw_curves([Curves("n", History(Series(nothing), Series([])), TokensHead.numbers)], tmp_path / "all.png")
    assert "not finite: 2 steps" in lines_of(figures[1], 0)


@pytest.mark.parametrize("steps", [1, 12, 300])
def test_a_picture_is_drawn_of_any_length(tmp_path: Path, figures: list[Figure], steps: int) -> None:
    draw_curves([curves(steps)], tmp_path / "loss.png")
    label = "moving average" if steps == 300 else "each step"
    assert len(lines_of(figures[0], 0)[label].get_ydata()) == steps
    assert all(float(tick).is_integer() for tick in figures[0].axes[-1].get_xticks())


def test_several_runs_are_drawn_over_each_other_and_named(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [curves(60 + place, name) for place, name in enumerate(("lr $1e-3$ {x_", "größer", "a\nb" + 90 * "c"))]
    draw_curves(runs, tmp_path / "loss.png")
    words = words_of(figures[0])
    assert "lr $1e-3$ {x_" in words
    assert "größer" in words
    assert r"a\nbccc" in words
    assert 90 * "c" not in words
    assert not [text for text in figures[0].findobj(Text) if "$" in text.get_text() and text.get_parse_math()]
    solid = [mark for mark in figures[0].axes[0].get_lines() if mark.get_linestyle() == "-"]
    assert [len(mark.get_xdata()) for mark in solid] == [60, 61, 62]
    assert len({mark.get_color() for mark in solid}) == 3
    assert "frequency: 4.11" in words
    assert figures[0].axes[-1].get_xlabel() == "optimizer step"


def test_runs_of_other_batches_and_data_are_compared_by_samples_and_without_baselines_of_one(
    tmp_path: Path, figures: list[Figure]
) -> None:
    other = KnownBaselines({"loss": [Baseline("uniform", 6.238), Baseline("frequency", 3.0)]})
    draw_curves([curves(60), curves(30, "b", other, batch=16)], tmp_path / "loss.png")
    assert figures[0].axes[-1].get_xlabel() == "samples trained on"
    assert [mark.get_xdata()[-1] for mark in figures[0].axes[0].get_lines()[:3:2]] == [480, 480]
    assert "uniform: 6.24" in words_of(figures[0])
    assert "frequency" not in words_of(figures[0])


def test_no_texts_overlap_and_none_is_cut(tmp_path: Path, figures: list[Figure]) -> None:
    starts = (8, 30, 50)
    rows = [line(step, attempt=1 + sum(step >= start for start in starts)) for step in range(1, 61)]
    resumed = replace(curves(), history=History(Series(rows), curves().history.held_out))
    for runs in ([resumed], [curves(name="n" * 80) for _ in range(9)]):
        draw_curves(runs, tmp_path / "loss.png", "$_{" * 40)
        figure = figures.pop()
        figure.draw_without_rendering()
        legends = [text for legend in figure.findobj(Legend) for text in legend.findobj(Text)]
        labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
        headings = list(figure.texts)
        texts = {text for text in (*legends, *labels, *headings) if text.get_text()}
        assert not [text for text in texts if "$" in text.get_text() and text.get_parse_math()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        assert not [text for text, box in boxes if box.x0 < 0 or box.x1 > figure.bbox.width]
        seen = [(text, box) for text, box in boxes if box.width and box.height]
        overlapping = [(a, b) for (a, one), (b, other) in combinations(seen, 2) if one.overlaps(other)]
        assert not [pair for pair in overlapping if pair[0] != pair[1]]
