"""What the ranks of a stalled run wait in, from files as the watchdog writes them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from support.run_folders import make_run

from beit_dist.config.run import WatchdogConfig
from beit_dist.engine.ranks.watchdog import Watchdog
from beit_dist.reports.run_state import read_state
from beit_dist.reports.run_table import details
from beit_dist.reports.stacks import waits_of
from beit_dist.storage.local import LocalPlace

NOW = 2_000_000_000.0
LOADER = """\
2026-11-28 08:40:31 rank 1 on node-2: no step has ended for 600 s
Thread 0x00007f77209fe6c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait

Thread 0x00007f777abe9b80 (most recent call first):
  File "/usr/lib/python3.11/selectors.py", line 415 in select
  File "/opt/beit/beit_dist/stream/loading.py", line 93 in _next
  File "/opt/beit/beit_dist/engine/trainer.py", line 210 in _step
"""
COLLECTIVE = LOADER.replace("selectors.py", "distributed_c10d.py").replace("in select", "in all_reduce")


def write(ranks: Path, rank: int, text: str) -> None:
    ranks.mkdir(parents=True, exist_ok=True)
    (ranks / f"rank-{rank:05d}.stacks.txt").write_text(text)


def test_the_ranks_that_wait_elsewhere_come_before_those_that_wait_alike(tmp_path: Path) -> None:
    for rank in (0, 1, 2, 5, 6):
        write(tmp_path, rank, LOADER + COLLECTIVE)  # of an earlier stall, and of this one
    write(tmp_path, 3, LOADER)
    write(tmp_path, 4, "")
    (tmp_path / "rank-00003.error.txt").write_text("another file")
    assert waits_of(tmp_path, 0.0) == [
        "rank 3: select, from beit_dist/stream/loading.py:93 in _next",
        "rank 4: has written no stacks: its process is frozen, or its host is gone",
        "ranks 0-2, 5-6: all_reduce, from beit_dist/stream/loading.py:93 in _next",
    ]


def test_stacks_of_an_earlier_stall_say_nothing_of_this_one(tmp_path: Path) -> None:
    write(tmp_path, 0, LOADER)
    os.utime(tmp_path / "rank-00000.stacks.txt", (NOW - 60, NOW - 60))
    assert "select" in waits_of(tmp_path, NOW - 120)[0]
    silent = (
        "all ranks have written no stacks, as while they measure on held-out data; or all processes are frozen"
    )
    assert waits_of(tmp_path, NOW) == [silent]


def test_a_file_without_a_stack_and_a_folder_that_is_not_there_are_no_errors(tmp_path: Path) -> None:
    assert waits_of(tmp_path / "ranks", 0.0) == []
    write(tmp_path, 0, "2026-11-28 08:40:31 rank 0 on node-2: no st")
    assert waits_of(tmp_path, 0.0) == ["rank 0: stacks that say nothing of its main thread"]


def test_what_the_watchdog_really_writes_is_read(tmp_path: Path) -> None:
    watchdog, end = Watchdog(WatchdogConfig(stall_seconds=60), tmp_path, 7), threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    watchdog.open()
    try:
        watchdog._dump(61.0)
    finally:
        end.set()
        other.join()
    (found,) = waits_of(tmp_path, 0.0)
    watchdog.close()
    assert found.startswith("rank 7: _dump, from beit_dist/engine/ranks/watchdog.py:")


def test_a_stalled_run_says_what_it_waits_in_and_another_does_not(tmp_path: Path) -> None:
    run = LocalPlace(tmp_path / "run")
    make_run(run, NOW, quiet=700.0)
    write(run.path / "ranks", 0, LOADER)
    os.utime(run.path / "ranks" / "rank-00000.stacks.txt", (NOW - 90, NOW - 90))
    stalled = read_state(run, "run", NOW)
    assert stalled.waits == ("rank 0: select, from beit_dist/stream/loading.py:93 in _next",)
    assert f"waits       {stalled.waits[0]}" in details(stalled, NOW, 80)
    assert stalled.facts()["waits"] == list(stalled.waits)
    assert read_state(run, "run", NOW - 690.0).waits == ()
