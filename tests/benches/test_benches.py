"""What the benchmarks do with what they measure; the measurements themselves are no test."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.benches import contenders, gpu, resumed, step, trainer
from beit_dist.benches.measuring import Row
from beit_dist.commands import bench
from beit_dist.engine.measuring import Timing

A_ROW = Row("plan", "a case", "ours", 2.0, "s", 1.0, 3.0)


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a bench in the place of one."""

    def put(name: str, measure: Any) -> None:
        module = types.ModuleType(name)
        vars(module)["measure"] = measure
        monkeypatch.setitem(sys.modules, f"beit_dist.benches.{name}", module)

    return put


def test_rows_are_printed_as_they_are_measured_and_kept(
    part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def measure(quick: bool) -> Iterator[Row]:
        yield A_ROW
        seen.append(capsys.readouterr().out)

    part("plan", measure)
    assert bench.main(["plan", "--quick", "--json", str(tmp_path / "rows.json")]) == 0
    assert "a case" in seen[0]
    assert "1 to 3" in seen[0]
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["rows"] == [vars(A_ROW)]
    assert {"cpu", "torch"} <= kept["machine"].keys()


def test_on_a_gpu_the_next_part_follows_one_that_fails_and_none_after_its_time(
    part: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(quick: bool, **more: Any) -> Iterator[Row]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", ("first", "step", "last"))
    part("first", fails)
    part("step", lambda quick, original, sizes, names: iter([A_ROW]))
    part("last", lambda quick: iter([A_ROW, A_ROW]))
    assert list(gpu.measure(True)) == [A_ROW] * 3
    assert "gpu: first: failed: RuntimeError: no such kernel" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "_SECONDS", -1.0)
    assert not list(gpu.measure(True))
    assert capsys.readouterr().err.count("left out") == 3


def test_the_best_way_of_each_is_compared_repetition_by_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {
        "fp32": {"ours": [1.0, 1.0], "Hugging Face, eager": [2.0, 2.0], "Hugging Face, SDPA": [3.0, 3.0]},
        "bf16": {"ours": [4.0, 4.0], "Hugging Face, eager": [5.0, 5.0], "Hugging Face, SDPA": [1.0, 2.0]},
    }
    monkeypatch.setattr(step, "_precisions", lambda device: list(taken))
    monkeypatch.setattr(
        step._Case,
        "in_turn",
        lambda case, *others: ((name, seconds, [1e-2]) for name, seconds in taken[case.precision].items()),
    )
    rows = list(step.measure(True))
    (ratio,) = [row for row in rows if row.case.endswith("best against best")]
    assert (ratio.who, ratio.low, ratio.high) == ("ours / Hugging Face", 1.0, 2.0)


def test_who_is_not_to_be_had_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(*given: Any) -> Any:
        raise contenders.UnavailableError("not here")

    monkeypatch.setattr(step, "Contender", nobody)
    case = step._Case("tiny", 1, "fp32", torch.device("cpu"), None)
    assert not list(case.in_turn(("ours, compiled",), 1))
    assert not list(case.one_by_one(("ours, compiled",), 1))
    assert capsys.readouterr().err == "step: ours, compiled: left out: not here\n" * 2


def test_the_trainers_own_words_are_understood() -> None:
    ((_, said), *_) = Timing((2.0, 1e-05, 4.0), (1, 3, 2), 0.0312).rows(batch=16, total=900, left=900)
    found = trainer._MEASURED.search(f"measured    {said}")
    assert found is not None
    assert [float(each) for each in found.groups()] == [2.0, 1e-05, 4.0, 3.1]


def test_a_step_that_differs_after_a_resume_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [f'{{"step": {n}, "loss": {n}.5, "attempt": 1}}' for n in range(1, 11)]
    killed = [line.replace('"attempt": 1', '"attempt": 2') for line in alone]
    killed[6] = killed[6].replace("7.5", "7.5000001")
    monkeypatch.setattr(
        resumed, "_train", lambda folder, name, *others, **more: alone if name == "alone" else killed
    )
    (row,) = resumed.measure(True)
    assert row.value == 9
