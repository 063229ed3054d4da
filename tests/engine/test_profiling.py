"""A trace of the steps that were asked for, on the ranks that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from beit_dist.config.run import ProfileConfig
from beit_dist.engine.profiling import Profiler


def run_steps(profiler: Profiler, last: int) -> None:
    for step in range(1, last + 1):
        profiler.step_begins(step)
        with torch.profiler.record_function(f"step-{step}"):
            torch.ones(3).sum()
        profiler.step_ended(step)


def traced(folder: Path) -> set[str]:
    events = json.loads((folder / "rank-00001.trace.json").read_text())["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("step-")}


@pytest.mark.parametrize(("steps", "expected"), [(2, {"step-3", "step-4"}), (9, {"step-3", "step-4", "step-5"})])
def test_the_trace_has_the_steps_asked_for_or_as_many_as_there_were(
    tmp_path: Path, steps: int, expected: set[str]
) -> None:
    profiler = Profiler(ProfileConfig(start_step=3, steps=steps, ranks=(1,)), tmp_path, 1)
    run_steps(profiler, 5)
    profiler.close()
    profiler.close()
    assert traced(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00001.trace.json"]


@pytest.mark.parametrize("settings", [ProfileConfig(), ProfileConfig(start_step=1, ranks=(0,))])
def test_other_ranks_and_runs_record_nothing(tmp_path: Path, settings: ProfileConfig) -> None:
    profiler = Profiler(settings, tmp_path, 1)
    run_steps(profiler, 5)
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a full disk torch says nothing, and leaves a part under a name of its own."""

    def cut_short(_: object, path: str) -> None:
        Path(path + ".tmp").write_text("{")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", cut_short)
    profiler = Profiler(ProfileConfig(start_step=1, steps=2), tmp_path, 0)
    run_steps(profiler, 5)
    assert "rank-00000.trace.json could not be written" in caplog.text
    assert not list(tmp_path.iterdir())
