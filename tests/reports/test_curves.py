"""The curve of a run: what is read from its metrics, and that a picture comes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from beit_dist.errors import DataError
from beit_dist.reports.curves import draw_curves, read_history, smoothed


def write_metrics(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def row(step: int, attempt: int = 1, loss: float | None = 5.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "accuracy": 0.01 * step, "attempt": attempt, "lr": 1e-3, "new": "key"}


def test_steps_are_read_in_order_and_resumes_found(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", [row(1), row(2), row(3, 2), row(4, 2), row(5, 4)])
    history = read_history(path)
    assert history.steps.tolist() == [1, 2, 3, 4, 5]
    assert history.accuracy.tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert history.resumed == (3, 5)


def test_a_step_trained_twice_counts_as_it_was_trained_last(tmp_path: Path) -> None:
    rows = [row(1), row(2), row(3, loss=9.0), row(3, 2, loss=4.0)]
    history = read_history(write_metrics(tmp_path / "metrics.jsonl", rows))
    assert history.loss.tolist() == [5, 5, 4]
    assert history.resumed == (3,)


def test_a_loss_that_was_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    history = read_history(write_metrics(tmp_path / "metrics.jsonl", [row(1), row(2, loss=None)]))
    assert history.loss[0] == 5
    assert math.isnan(history.loss[1])


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", [row(1), row(2)], tail='{"step": 3, "lo')
    assert read_history(path).steps.tolist() == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", [row(1)], tail='{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_history(path)


@pytest.mark.parametrize("content", [None, ""])
def test_a_run_without_steps_is_refused_with_a_way_out(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl.*(begun|reach)"):
        read_history(path)


def test_the_moving_average_keeps_a_line_and_skips_gaps() -> None:
    line = np.arange(400, dtype=np.float64)
    assert smoothed(line)[100] == pytest.approx(100)
    gaps = np.where(np.arange(400) % 3 == 0, np.nan, 7.0)
    assert np.allclose(smoothed(gaps), 7)
    assert np.isnan(smoothed(np.full(5, np.nan))).all()


@pytest.mark.parametrize("steps", [1, 12, 300])
def test_a_picture_is_drawn_of_any_length(tmp_path: Path, steps: int) -> None:
    rows = [row(step, attempt=1 + (step > 8), loss=6 - step / 100) for step in range(1, steps + 1)]
    history = read_history(write_metrics(tmp_path / "metrics.jsonl", rows))
    out = tmp_path / "pictures" / "loss.png"
    draw_curves(history, 512, out)
    pixels = imread(out)
    assert pixels.shape[:2] == (900, 1200)
    assert pixels[..., :3].std() > 0.01
