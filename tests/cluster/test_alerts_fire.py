"""Alerts of runs that are really broken: the right one fires, no other critical one does, and it ends once mended.

The rules are the committed ones, with all their times 150 times as short (:func:`support.prometheus.hurried`); for
a run that is started several times 40 times, as starts take their time on a busy machine.
Warnings about speed may fire on a busy machine, and say nothing here, except where speed is what is broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fault_proxy import Fault, FaultProxy
from support.http_files import HttpFiles
from support.ports import free_ports
from support.prometheus import FOLDER, Server, hurried, running, until
from support.runs import Run, wait

from beit_dist.reports.run_state import read_state
from beit_dist.storage.local import LocalPlace

pytestmark = [pytest.mark.cluster, pytest.mark.server, pytest.mark.slow]

HURRY, LESS_HURRY = 150, 40
ALERTS = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
CRITICAL = {
    rule["alert"] for group in ALERTS for rule in group["rules"] if rule["labels"]["severity"] == "critical"
}
SETTINGS = ["epochs=100000", "watchdog.stall_seconds=2"]
SETTINGS += ["checkpoint.every_steps=null", "checkpoint.every_minutes=60"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for most runs of this file; each has a label of its own."""
    with running(tmp_path_factory.mktemp("prometheus"), HURRY) as server:
        yield server


@pytest.fixture
def patient_prometheus(tmp_path: Path) -> Iterator[Server]:
    """One that lets several starts be near each other."""
    with running(tmp_path / "prometheus", LESS_HURRY) as server:
        yield server


class Watched:
    """A run that is scraped.

    Args:
        expected: critical alerts that may fire; any other fails the test.
    """

    def __init__(self, run: Run, server: Server) -> None:
        self.run, self.server, self.name = run, server, run.folder.name
        self.port = free_ports(1)[0]
        self.expected: set[str] = set()
        self.process: Any = None
        self._target = server.target("train", self.name, self.port)

    def start(self, *overrides: str) -> None:
        """Start it, and wait until a step of this start was scraped."""
        before = self._attempt()
        self.process = self.run.start(f"logging.metrics_port={self.port}", *overrides)
        until(lambda: self._attempt() > before and self._steps() > 0, "a scrape", watched=self._look)

    def _attempt(self) -> int:
        found = self.server.asked("query", query=f'max_over_time(beit_train_attempt{{run="{self.name}"}}[1h])')
        return max((int(series["value"][1]) for series in found["result"]), default=0)

    def _steps(self) -> float:
        found = self.server.asked("query", query=f'beit_train_steps_total{{run="{self.name}"}}')
        return max((float(series["value"][1]) for series in found["result"]), default=0)

    def trains_well(self) -> None:
        """Wait until more steps were scraped; no critical alert may fire."""
        before = self._steps()
        until(lambda: self._steps() > before + 5, "steps", watched=self._look)

    def alert(self, name: str) -> None:
        """Wait until an alert fires."""
        self.expected.add(name)
        until(lambda: name in self.server.firing(self.name), name, watched=self._look)

    def ends(self, name: str) -> None:
        """Wait until an alert does not fire any more; from then on it must not."""
        until(lambda: name not in self.server.firing(self.name), f"the end of {name}", watched=self._look)
        self.expected.discard(name)

    def _look(self) -> None:
        wrong = self.server.firing(self.name) & CRITICAL - self.expected
        assert not wrong, f"{wrong} fires, and nothing of that kind is broken"

    def health(self) -> str:
        """What ``/healthz`` says."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=10) as answer:
                return str(json.load(answer)["state"])
        except urllib.error.HTTPError as error:
            return str(json.load(error)["state"])

    def ranks(self) -> list[int]:
        """Process ids of this start."""
        return [rank["pid"] for rank in self.run.facts()["ranks"]]

    def kill(self) -> None:
        """As the kernel does where memory ends."""
        for pid in self.ranks():
            os.kill(pid, signal.SIGKILL)
        wait(self.process, 60)

    def close(self) -> None:
        """Stop it, and take its target back."""
        self._target.unlink()
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(FileNotFoundError):  # it had not come as far as run.json
                for pid in self.ranks():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            wait(self.process, 60)


@pytest.fixture
def watch(prometheus: Server, new_run: Callable[..., Run]) -> Iterator[Callable[..., Watched]]:
    """``watch(name, *settings, ranks=1, server=None)``: a run that Prometheus scrapes, not started yet."""
    with contextlib.ExitStack() as runs:

        def make(name: str, *settings: str, ranks: int = 1, server: Server | None = None) -> Watched:
            run = new_run(name, ranks=ranks, overrides=[*SETTINGS, *settings])
            watched = Watched(run, server or prometheus)
            runs.callback(watched.close)
            return watched

        yield make


def test_the_rules_are_the_committed_ones_with_shorter_times(prometheus: Server) -> None:
    numbers = re.compile(r"\b\d+(\.\d+)?(ms|[mh])?\b")
    for name in ("rules.yaml", "alerts.yaml"):
        committed, used = (FOLDER / name).read_text(), hurried((FOLDER / name).read_text(), HURRY)
        assert numbers.sub("N", used) == numbers.sub("N", committed)
        assert not re.findall(r"\[\d+[mh]\]|for: \d+m\b|offset \d+h|3600|900\b", used)
    groups = until(lambda: prometheus.asked("rules").get("groups"), "the rules")
    assert {rule["name"] for group in groups for rule in group["rules"] if "alerts" in rule} >= CRITICAL


def test_a_rank_that_hangs_is_a_stall_until_it_moves_again(watch: Callable[..., Watched]) -> None:
    run = watch("hanging", ranks=2)
    run.start()
    run.trains_well()
    os.kill(run.ranks()[1], signal.SIGSTOP)
    run.alert("BeitStalled")
    assert run.health() == "stalled"
    stacks = run.run.folder / "ranks" / "rank-00000.stacks.txt"
    assert "most recent call first" in stacks.read_text()
    folder = LocalPlace(run.run.folder)
    waits = until(lambda: read_state(folder, "run", time.time()).waits, "what the ranks wait in")
    assert "rank 1: has written no stacks: its process is frozen, or its host is gone" in waits
    assert any(re.match("rank 0: .*from beit_dist/", wait) for wait in waits), waits
    os.kill(run.ranks()[1], signal.SIGCONT)
    run.ends("BeitStalled")
    assert run.health() == "working"
    run.trains_well()


class Valve(FaultProxy):
    """A source of data that can be shut: who asks then waits until it is open."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.open = threading.Event()
        self.open.set()

    def choose(self, method: str, path: str, has_range: bool) -> Fault | None:
        """As it is, once the valve is open."""
        self.open.wait()
        return super().choose(method, path, has_range)


def test_a_source_that_is_slow_binds_the_run_and_one_that_hangs_stalls_it(
    watch: Callable[..., Watched], small_data: Path
) -> None:
    with HttpFiles(small_data) as files, Valve(files.url) as source:
        run = watch("starving", f"data={source.url}", "loader.block_samples=8")
        source.inject(Fault("delay", method="GET", path="/v0", seconds=0.2))
        run.start()
        run.alert("BeitDataBound")
        source.open.clear()
        run.alert("BeitStalled")
        source.inject()
        source.open.set()
        run.ends("BeitStalled")
        run.trains_well()


def test_a_full_disk_fails_saves_and_then_lacks_checkpoints(
    small_disk: Path, watch: Callable[..., Watched]
) -> None:
    often = ["checkpoint.every_minutes=0.03", "checkpoint.max_failed_saves=1000", "checkpoint.keep=1"]
    run = watch("disk/full", *often)
    run.start()
    run.trains_well()
    run.expected |= {"BeitSavesFailing"}
    with (small_disk / "ballast").open("wb") as ballast:
        space = os.statvfs(small_disk)
        os.posix_fallocate(ballast.fileno(), 0, space.f_bavail * space.f_bsize)
    run.alert("BeitSavesFailing")
    run.alert("BeitNoCheckpoint")
    (small_disk / "ballast").unlink()
    run.ends("BeitNoCheckpoint")
    run.ends("BeitSavesFailing")
    run.trains_well()


def test_a_run_that_is_killed_again_and_again_is_a_crash_loop_until_it_comes_further(
    patient_prometheus: Server, watch: Callable[..., Watched]
) -> None:
    run = watch("killed", server=patient_prometheus)
    run.start()
    for _ in range(3):
        run.kill()
        run.expected |= {"BeitTargetDown", "BeitCrashLoop"}  # a start may take long
        run.start()
    run.alert("BeitCrashLoop")
    os.kill(run.ranks()[0], signal.SIGTERM)  # which saves, so that the next start comes further
    wait(run.process, 60)
    run.alert("BeitTargetDown")
    run.start()
    run.ends("BeitTargetDown")
    run.ends("BeitCrashLoop")
