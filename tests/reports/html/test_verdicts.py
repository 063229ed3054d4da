"""A verdict says how far beyond its baselines a run is, by held-out data; where that is unknown, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.reported import BASELINES, make_run, steps_of, subjects

from beit_dist.reports.html.verdicts import Verdict, compared, verdict_of


def measured(step: int, **numbers: float) -> dict[str, Any]:
    return {"step": step, "samples": 8 * step, "attempt": 1, "seconds": 1.0, **numbers}


def judge(folder: Path, lines: list[dict[str, Any]], kind: str = "pretraining", **how: Any) -> Verdict:
    (run,) = subjects(make_run(folder, kind, steps=steps_of(40), measured=lines, **how))
    return verdict_of(run)


@pytest.mark.parametrize(
    ("loss", "accuracy", "word", "tone"),
    [
        (3.0, 0.23, "beyond its baselines", "good"),
        (3.9, 0.08, "beyond some baselines", "middling"),
        (4.1, 0.08, "not beyond its baselines", "bad"),
    ],
)
def test_the_word_depends_on_which_baselines_are_passed(
    tmp_path: Path, loss: float, accuracy: float, word: str, tone: str
) -> None:
    verdict = judge(tmp_path / "r", [measured(40, loss=loss, accuracy=accuracy)])
    assert (verdict.word, verdict.tone) == (word, tone)
    assert verdict.of == "on held-out data, after step 40"


def test_the_sentence_tells_how_far_and_figures_tell_the_best(tmp_path: Path) -> None:
    lines = [measured(20, loss=3.0, accuracy=0.25), measured(40, loss=2.9, accuracy=0.2)]
    verdict = judge(tmp_path / "r", lines)
    assert verdict.sentence == "Accuracy 20.0%: 2.0 times commonest token (10.0%)."
    loss, accuracy = verdict.figures
    assert (loss.text, loss.beyond, loss.best) == ("2.9000", "1.10 below frequency (4.0000)", "")
    assert accuracy.best == "best 25.0% at step 20"
    assert accuracy.bar == (pytest.approx(0.8), (pytest.approx(0.4),))  # of 25 %


def test_without_held_out_data_nothing_is_claimed(tmp_path: Path) -> None:
    verdict = judge(tmp_path / "r", [])
    assert (verdict.word, verdict.tone) == ("not measured", "open")
    assert "--held-out" in verdict.advice
    assert verdict.of == "in training, the mean of the last 2 steps"
    assert verdict.figures[0].value == pytest.approx(4 - (39 + 40) / 80)


def test_without_baselines_nothing_is_judged(tmp_path: Path) -> None:
    verdict = judge(tmp_path / "r", [measured(40, loss=1.0)], "classification", baselines={})
    assert (verdict.word, verdict.tone) == ("not judged", "open")


def test_a_run_without_a_step_has_nothing_to_judge(tmp_path: Path) -> None:
    (run,) = subjects(make_run(tmp_path / "r", marker=None))
    assert verdict_of(run).word == "nothing to judge"


TOKENS = {"psnr": 24.0, "perplexity": 300.0, "used": 500, "vocabulary": 512, "dead": 12, "commonest_share": 0.02}
COLOURS = {"training": {}, "held_out": {"psnr": {"palette": 20.0, "mean colour": 22.0}}}


@pytest.mark.parametrize(
    ("changed", "marker", "word"),
    [
        ({}, {}, "good"),
        ({"perplexity": 3.0}, {}, "collapsed"),
        ({"psnr": 19.0}, {}, "poor"),
        ({}, {"verdict": {"word": "usable", "why": "W.", "advice": "A."}}, "usable"),
    ],
)
def test_a_tokenizer_has_its_own_verdict(
    tmp_path: Path, changed: dict[str, float], marker: dict[str, Any], word: str
) -> None:
    lines = [measured(40, **{**TOKENS, **changed})]
    verdict = judge(tmp_path / "r", lines, "tokenizer", baselines=COLOURS, marker=("DONE", marker))
    assert verdict.word == word
    assert [figure.text for figure in verdict.figures][2] == "500"


def test_of_several_runs_the_best_held_out_number_is_marked(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / name, steps=steps_of(40), measured=[measured(40, loss=loss, accuracy=accuracy)])
        for name, loss, accuracy in (("a", 3.0, 0.2), ("b", 2.5, 0.15))
    ]
    comparison = compared([verdict_of(run) for run in subjects(*folders)])
    assert comparison.columns == ("Loss", "Accuracy")
    assert [cells for _, cells in comparison.rows] == [
        (("3.0000", False), ("20.0%", True)),
        (("2.5000", True), ("15.0%", False)),
    ]


@pytest.mark.parametrize(("kind", "uniform"), [("classification", 4.16), ("pretraining", 2.3)])
def test_numbers_of_other_kinds_or_other_data_are_not_compared(tmp_path: Path, kind: str, uniform: float) -> None:
    known = {"held_out": {"loss": {"uniform": uniform, "frequency": 4.0}}}
    folders = [
        make_run(tmp_path / "a", steps=steps_of(40), measured=[measured(40, loss=3.0, accuracy=0.2)]),
        make_run(tmp_path / "b", kind, steps=steps_of(40), measured=[measured(40, loss=1.0)], baselines=known),
    ]
    comparison = compared([verdict_of(run) for run in subjects(*folders)])
    assert not any(best for _, cells in comparison.rows for _, best in cells)


def test_a_number_in_training_is_never_the_best(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", steps=steps_of(40), measured=[measured(40, loss=3.9, accuracy=0.2)])
    other = make_run(tmp_path / "b", steps=steps_of(40), baselines=BASELINES)
    comparison = compared([verdict_of(run) for run in subjects(one, other)])
    assert not any(best for _, cells in comparison.rows for _, best in cells)
