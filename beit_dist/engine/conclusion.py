"""What a run says of itself at its end: what it came to, where everything lies, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from beit_dist.engine.progress import clock, said
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.task import Task
from beit_dist.step_numbers import Baselines, KnownBaselines, Number

_UNMEASURED = "nothing was measured on held-out images, so it is not known what the model has learnt"


def conclusion(
    task: Task[Any, Any, Any], run: RunFolder, steps: tuple[int, int], seconds: float, baselines: KnownBaselines
) -> str:
    """The lines of a run that is done.

    Args:
        steps: taken, and asked for.
        seconds: that this start took.
    """
    where = str(run.place)
    lines = [f"done: step {steps[0]} of {steps[1]} in {clock(seconds)}, run folder {where}"]
    results = read_results(run.validation)
    if results:
        lines += _held_out(task.measured, results, baselines.held_out)
    elif task.measured:
        lines.append(f"{_UNMEASURED}: {task.way_to_measure}")
    lines += [f"  {what:<12} {place}" for what, place in _places(run, bool(results))]
    if following := task.next_commands():
        lines += ["next:", *(f"  {command}" for command in following)]
    return "\n".join(lines)


def verdict(numbers: Sequence[Number], values: Mapping[str, Any], baselines: Baselines) -> Iterator[str]:
    """Each number, and how far it has come beyond its strongest baseline."""
    for number in numbers:
        value = values.get(number.name)
        if number.text is None or value is None:
            continue
        strongest = number.strongest(baselines.get(number.name, ()))
        yield said(number, value) + (f", {number.beyond(value, strongest)}" if strongest else "")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of ``validation.jsonl``."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _held_out(
    numbers: Sequence[Number], results: Sequence[Mapping[str, Any]], baselines: Baselines
) -> Iterator[str]:
    yield f"held out: {'; '.join(verdict(numbers, results[-1], baselines))}"
    judged = next((number for number in numbers if number.better is not None), None)
    if judged is None:
        return
    known = [line for line in results if line.get(judged.name) is not None]
    if known:
        best = known[0]
        for line in known[1:]:
            best = line if judged.is_better(line[judged.name], best[judged.name]) else best
        if best["step"] != results[-1]["step"]:
            yield f"best: {said(judged, best[judged.name])} at step {best['step']}"


def _places(run: RunFolder, measured: bool) -> Iterator[tuple[str, str]]:
    yield "checkpoints", str(run.checkpoints)
    yield "numbers", f"{run.metrics}" + (f", {run.validation.name}" if measured else "")
