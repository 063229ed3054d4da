"""A rank in which no step ends writes down its stacks, once a stall and on demand; torch's recorder is set up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beit_dist.config.run import WatchdogConfig
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.ranks.watchdog import Watchdog, record_collectives


def until(true: Callable[[], bool]) -> bool:
    """Wait for it, for half a minute at most."""
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_one_dump_for_each_stall_with_rank_host_and_stacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watchdog = Watchdog(WatchdogConfig(stall_seconds=0.1), tmp_path / "ranks", 3)
    watchdog.open()
    watchdog.metrics = Metrics()
    watchdog._thread.start()  # without the process's handlers: pytest has its own
    try:
        time.sleep(0.4)
        assert watchdog.stalls == 0  # the start is not watched, unless it is asked for
        watchdog.beat()
        assert until(lambda: watchdog.stalls == 1)
        time.sleep(0.4)
        assert watchdog.stalls == 1
        watchdog.beat()
        assert until(lambda: watchdog.stalls == 2)
    finally:
        watchdog._closed.set()
        watchdog._thread.join()
    text = (tmp_path / "ranks" / "rank-00003.stacks.txt").read_text()
    assert text.count("rank 3 on") == 2
    assert "test_one_dump_for_each_stall" in text
    assert len(caplog.records) == 2
    assert watchdog.metrics.registry.get_sample_value("beit_train_stalls_total") == 2


def test_the_start_is_watched_when_asked(tmp_path: Path) -> None:
    watchdog = Watchdog(WatchdogConfig(start_seconds=0.1), tmp_path, 0)
    watchdog._thread.start()
    assert until(lambda: watchdog.stalls == 1)
    watchdog._closed.set()
    watchdog._thread.join()


def run(program: str, folder: Path, begun: bool = True) -> subprocess.CompletedProcess[str]:
    start = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from beit_dist.config.run import WatchdogConfig\nfrom beit_dist.engine.ranks.watchdog import Watchdog\n"
        f"watchdog = Watchdog(WatchdogConfig(), Path({str(folder)!r}), 0).start()\n"
        f"{'watchdog.open()' if begun else ''}\n"
    )
    return subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True, timeout=60)


def test_sigusr2_dumps_on_demand_and_goes_on(tmp_path: Path) -> None:
    result = run("os.kill(os.getpid(), signal.SIGUSR2)\nprint('on')\nwatchdog.close()\n", tmp_path)
    assert result.stdout == "on\n"
    assert "most recent call first" in (tmp_path / "rank-00000.stacks.txt").read_text()


def test_before_there_is_a_run_folder_the_stacks_are_shown(tmp_path: Path) -> None:
    result = run("os.kill(os.getpid(), signal.SIGUSR2)\nprint('on')\nwatchdog.close()\n", tmp_path / "new", False)
    assert result.stdout == "on\n"
    assert "most recent call first" in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_fatal_error_leaves_its_stacks(tmp_path: Path) -> None:
    result = run("os.abort()\n", tmp_path)
    assert result.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in (tmp_path / "rank-00000.stacks.txt").read_text()


def test_where_nothing_happened_nothing_is_left(tmp_path: Path) -> None:
    result = run("watchdog.beat()\nwatchdog.close()\n", tmp_path)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == []


def test_the_flight_recorder_writes_into_the_run_folder_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    record_collectives(tmp_path / "ranks", environment)
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "ranks" / "flight-")
    assert environment["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    own = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/own"}
    record_collectives(tmp_path, environment := dict(own))
    assert {name: environment[name] for name in own} == own
    assert "TORCH_FR_BUFFER_SIZE" not in environment
    assert "TORCH_FR_DUMP_TEMP_FILE" not in environment
