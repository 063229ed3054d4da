"""Run folders as starts leave them, made up: with any state, and none of it trained."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import psutil
import yaml

from beit_dist.checkpoints.layout import folder_name, sealed
from beit_dist.storage.place import Place

HERE = socket.gethostname()
ALIVE = {"rank": 0, "host": HERE, "pid": os.getpid()}
GONE = {"rank": 0, "host": HERE, "pid": 2**22 + 1}  # beyond what Linux gives
ELSEWHERE = {"rank": 0, "host": "node-17", "pid": 1}
CONFIG = {
    "global_batch": 64,
    "steps": None,
    "watchdog": {"stall_seconds": 600.0, "start_seconds": None},
    "checkpoint": {"every_steps": None, "every_minutes": 15.0},
}


def line(step: int, time: float, attempt: int = 1, **others: Any) -> dict[str, Any]:
    """A step; one takes two seconds."""
    return {
        "step": step,
        "samples": 64 * step,
        "loss": 5.0,
        "attempt": attempt,
        "time": time,
        "images_per_second": 32.0,
        **others,
    }


def lines_of(*steps: dict[str, Any]) -> bytes:
    """As ``metrics.jsonl`` has them."""
    return b"".join(json.dumps(step).encode() + b"\n" for step in steps)


def make_run(
    run: Place,
    now: float,
    *,
    steps: int = 100,
    quiet: float = 3.0,
    attempt: int = 1,
    rank: dict[str, Any] = ALIVE,
    marker: str = "",
    saved: int | None = 90,
    run_json: bool = True,
    **facts: Any,
) -> Place:
    """A run folder.

    Args:
        now: Unix time.
        steps: taken by this start, of 1000.
        quiet: seconds since the last sign of life.
        rank: its only process.
        marker: how it ended, with ``facts``.
        saved: step of its checkpoint.
        run_json: whether the start has written what comes after its number.
    """
    last = now - quiet
    # this process is the one that runs, so its start is the run's
    began = psutil.Process().create_time() if rank is ALIVE else last - 2 * steps - 20
    run.make()
    for number in range(1, attempt + 1):
        mark = {"host": rank["host"], "pid": rank["pid"], "id": f"{number}"}
        (run / "checkpoints" / "attempts").make()
        (run / "checkpoints" / "attempts").write(f"{number:06d}", json.dumps(mark).encode())
        if run.is_local:
            os.utime(run.path / "checkpoints" / "attempts" / f"{number:06d}", (began, began))
    if run_json:
        told = {"attempt": attempt, "started": began, "kind": "pretraining", "ranks": [rank], "total_steps": 1000}
        told["baselines"] = {"training": {"loss": {"uniform": 9.0109, "frequency": 5.5}}, "held_out": {}}
        run.write("run.json", json.dumps(told).encode())
        run.write("config.yaml", yaml.safe_dump(CONFIG).encode())
    rows = [line(step, last - 2 * (steps - step), attempt) for step in range(1, steps + 1)]
    if rows and run.is_local:
        run.write("metrics.jsonl", lines_of(*rows))
    if saved is not None and run_json:
        checkpoint = run / "checkpoints" / folder_name(saved, attempt)
        checkpoint.make()
        if rows and not run.is_local:
            checkpoint.write("metrics.jsonl", lines_of(*rows[:saved]))
        checkpoint.write("manifest.json", sealed({"step": saved, "saved_at": last - 20.0}))
    if marker:
        run.write(marker, json.dumps({"time": last, "host": rank["host"], **facts}).encode())
    return run
