"""The numbers of a run: what is read from its files of numbers, wherever they lie."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit_dist.errors import DataError
from beit_dist.reports.history import read_history, smoothed
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place


def write(folder: Path, rows: list[dict[str, Any]], tail: str = "", name: str = "metrics.jsonl") -> LocalPlace:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return LocalPlace(folder)


def row(step: int, attempt: int = 1, loss: float | None = 5.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "accuracy": 0.01 * step, "attempt": attempt, "lr": 1e-3, "batch": "0f"}


def test_steps_are_read_in_order_and_resumes_found(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, [row(1), row(2), row(3, 2), row(4, 2), row(5, 4)]))
    assert history.trained.steps.tolist() == [1, 2, 3, 4, 5]
    assert history.trained.values("accuracy").tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert history.resumed == (3, 5)
    assert history.held_out.lines == []


def test_a_step_trained_twice_counts_as_it_was_trained_last(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, [row(1), row(2), row(3, loss=9.0), row(3, 2, loss=4.0)]))
    assert history.trained.values("loss").tolist() == [5, 5, 4]
    assert history.resumed == (3,)


def test_a_loss_that_was_not_finite_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, [row(1), row(2, loss=None), {"step": 3}]))
    assert history.trained.values("loss")[0] == 5
    assert np.isnan(history.trained.values("loss")[1:]).all()
    assert history.trained.not_finite("loss").tolist() == [False, True, False]


def test_what_was_measured_on_held_out_data_is_read(tmp_path: Path) -> None:
    write(tmp_path, [row(20), row(10, loss=4.5)], name="validation.jsonl")
    history = read_history(write(tmp_path, [row(1)]))
    assert history.held_out.steps.tolist() == [10, 20]
    assert history.held_out.values("loss").tolist() == [4.5, 5.0]


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, [row(1), row(2)], tail='{"step": 3, "lo'))
    assert history.trained.steps.tolist() == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2"):
        read_history(write(tmp_path, [row(1)], tail='{"step": 2, "lo\n{"step": 3}\n'))


@pytest.mark.parametrize("content", [None, ""])
def test_a_run_without_steps_is_refused_with_a_way_out(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl.*(begun|first step)"):
        read_history(LocalPlace(tmp_path))


def test_the_numbers_of_a_run_at_a_url_are_those_of_its_newest_checkpoint() -> None:
    run = open_place("memory://history/run")
    for step in (1, 2):
        checkpoint = run / "checkpoints" / f"step-{step:08d}.a0001"
        checkpoint.write("metrics.jsonl", "".join(json.dumps(row(s)) + "\n" for s in range(1, step + 1)).encode())
        checkpoint.write("manifest.json", json.dumps({"step": step, "attempt": 1}).encode())
    assert read_history(run).trained.steps.tolist() == [1, 2]


def test_the_moving_average_keeps_a_line_and_skips_gaps() -> None:
    line = np.arange(400, dtype=np.float64)
    assert smoothed(line)[100] == pytest.approx(100)
    gaps = np.where(np.arange(400) % 3 == 0, np.nan, 7.0)
    assert np.allclose(smoothed(gaps), 7)
    assert math.isnan(smoothed(np.full(5, np.nan))[2])
