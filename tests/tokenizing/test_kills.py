"""Workers that are killed with SIGKILL at any moment: nothing is lost, done twice, or left half."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit_dist.shards.verification import verify
from beit_dist.storage.durable import TEMPORARY

WORKERS = 5
ROUNDS = 4
SETTINGS: dict[str, Any] = {"shard_samples": 1, "views": 3}


def slowly(bench: Any) -> None:
    """Have an encoder that takes its time, so that kills meet workers in the middle of something."""
    honest = bench.encoder

    def encode(images: Any) -> Any:
        time.sleep(0.03)
        return honest(images)

    bench.encoder = encode


def committed(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file that a commit accounts for."""
    found = {}
    for path in out.glob("commits/shard-*.json"):
        for info in json.loads(path.read_bytes())["files"]:
            status = (out / info["name"]).stat()
            found[info["name"]] = (status.st_ino, status.st_mtime_ns)
    return found


def test_five_workers_killed_again_and_again_write_what_one_writes(
    bench: Any, tmp_path: Path, read_content: Callable[[Path], dict[str, str]]
) -> None:
    whole = bench.run("whole", **SETTINGS)
    out, draws, context = tmp_path / "out", random.Random(0), multiprocessing.get_context("fork")
    bench.job(out, **SETTINGS)
    slowly(bench)
    killed, seen = 0, {}
    for turn in range(ROUNDS + 1):
        workers = [
            context.Process(target=bench.work, args=(out, index, WORKERS), kwargs=SETTINGS)
            for index in range(WORKERS)
        ]
        for worker in workers:
            worker.start()
        for victim in draws.sample(workers, 2) if turn < ROUNDS else []:
            time.sleep(draws.uniform(0, 0.15))
            if victim.is_alive():
                os.kill(victim.pid or 0, signal.SIGKILL)

        for worker in workers:
            if turn < ROUNDS:
                worker.kill()  # the others too, or nothing would be left for the next round
            worker.join()
            killed += worker.exitcode == -signal.SIGKILL
            assert worker.exitcode in (0, -signal.SIGKILL)
        now = committed(out)
        assert seen.items() <= now.items(), "a finished shard was made again"
        seen = now
    assert killed >= 2
    bench.finish(out)
    assert read_content(out) == read_content(whole)
    assert not list(out.rglob(f"*{TEMPORARY}"))
    manifest = bench.finish(out)
    assert not list(verify(str(out), manifest))
