"""How far a job is, told from its folder, and as ``beit runs`` lists it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from beit_dist.commands.runs import main
from beit_dist.storage.opening import open_place
from beit_dist.tokenizing.job_state import job_state


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([str(folder), "--json", "-"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_the_shards_of_both_parts_are_counted(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = bench.root / "sets" / "photos"
    bench.job(out, held_out="4")
    state = job_state(open_place(out))
    assert (state.made, state.shards, state.images, state.finished) == (0, 4, 13, False)
    bench.work(out, index=0, count=2, held_out="4")
    state = job_state(open_place(out))
    assert 0 < state.made < 4
    (row,) = listed(bench.root / "sets", capsys)
    told = {"name": "photos", "kind": "shards", "state": "unfinished", "step": state.made, "total_steps": 4}
    assert row.items() >= told.items()
    assert (row["note"], row["last_activity"] is None) == ("", False)
    bench.work(out, index=1, count=2, held_out="4")
    assert listed(bench.root / "sets", capsys)[0]["note"] == f"to finish it: beit shards --out {out} --finish"
    bench.finish(out)
    (row,) = listed(bench.root / "sets", capsys)  # the held-out images are no other row
    assert (row["state"], row["step"], row["note"], row["damage"]) == ("done", 4, "", [])


def test_a_damaged_job_is_named_and_the_others_are_listed(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        bench.run(f"sets/{name}")
    (bench.root / "sets" / "a" / "job.json").write_text("{}")
    rows = {row["name"]: row for row in listed(bench.root / "sets", capsys)}
    assert rows["b"]["state"] == "done"
    assert rows["a"]["state"] == "unknown"
    assert "job.json" in rows["a"]["damage"][0]
