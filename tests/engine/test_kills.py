"""Killed with -9 again and again, anything at any moment, a run ends as if nothing had happened.

Five kills in the tests; as many as ``BEIT_KILLS`` says in ``make soak``. What is killed, and when, comes from a
seed; a moment is something seen in the run folder, so that every kill strikes however slow the machine is.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.processes import left_of

KILLS = int(os.environ.get("BEIT_KILLS", "5"))
SEED = int(os.environ.get("BEIT_SEED", "0"))
# 38 MB a save and steps of a tenth of a second, a save after every second one: one is nearly always under way.
LARGE = ["model.width=256", "model.depth=4", "micro_batch=8", "optimizer.lr=1e-3", "checkpoint.every_steps=2"]
LARGE += ["max_fruitless_starts=null"]  # whatever the dice
STEPS = 30 + 15 * KILLS  # a start gets through 6 or so before it is killed
LIMIT = 180 + 15 * KILLS  # seconds for one start that runs to the end; a soak may share its machine
MOMENTS = ("in a save", "after steps", "in a save", "as it starts")
TARGETS = ("a rank", "the launcher", "all")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 120 * KILLS)]


@dataclass(frozen=True)
class Kill:
    """What is killed, and when."""

    moment: str
    target: str
    count: int  # how many steps or saves of the attempt are let pass before
    delay: float  # 0 to 1: how far into the moment
    rank: int
    early: (
        bool  # ranks of the attempt before that outlived their launcher wake as this one starts, not at the kill
    )


def drawn(dice: random.Random) -> list[Kill]:
    """The kills of a run: moments and targets evenly mixed, whatever the dice."""
    moments, targets = ([names[i % len(names)] for i in range(KILLS)] for names in (MOMENTS, TARGETS))
    dice.shuffle(moments)
    dice.shuffle(targets)
    return [
        Kill(moment, target, dice.randint(1, 3), dice.random(), dice.randrange(2), dice.random() < 0.5)
        for moment, target in zip(moments, targets, strict=True)
    ]


@dataclass
class Start:
    """One start of the run, watched from outside."""

    run: Any
    attempt: int
    process: subprocess.Popen[str]

    @property
    def unfinished(self) -> list[str]:
        """Checkpoints of this attempt that are not committed."""
        found = (self.run.folder / "checkpoints").glob(f"step-*.a{self.attempt:04d}")
        return [folder.name for folder in found if not (folder / "manifest.json").exists()]

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for something that is seen in the run folder."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"attempt {self.attempt} ended, or hung, before {what}: {self.said}")
            time.sleep(0.002)

    def until_begun(self) -> None:
        """Wait until it has taken its number."""
        number = self.run.folder / "checkpoints" / "attempts" / f"{self.attempt:06d}"
        self.until(number.exists, "it took its number")

    def until_killed(self, kill: Kill) -> None:
        """Wait for the moment of ``kill``."""
        if kill.moment == "as it starts":
            time.sleep(2 * kill.delay)
        elif kill.moment == "after steps":
            own = f'"attempt": {self.attempt}, '
            self.until(lambda: self._recorded(own) >= 2 * kill.count, "its steps")
            time.sleep(0.2 * kill.delay)
        else:
            seen: set[str] = set()
            missed: list[str] = []

            def struck() -> bool:
                now = self.unfinished
                seen.update(now)
                if len(seen) < kill.count or not now:
                    return False
                # A save that is whole by now was too quick: the next one is struck sooner.
                time.sleep(0.1 * kill.delay / 2 ** len(missed))
                missed.append(now[0])
                return now[0] in self.unfinished

            self.until(struck, "its saves")

    def _recorded(self, own: str) -> int:
        path = self.run.folder / "metrics.jsonl"
        return path.read_text().count(own) if path.exists() else 0

    @property
    def said(self) -> str:
        """The end of its output."""
        return self.log.read_text()[-3000:]

    @property
    def log(self) -> Path:
        """Where its output goes: a pipe would be held open by ranks that outlive their launcher."""
        return Path(f"{self.run.folder}.{self.attempt}.log")


def started(run: Any) -> Start:
    """Start the run once more."""
    attempts = run.folder / "checkpoints" / "attempts"
    attempt = 1 + max((int(path.name) for path in attempts.glob("*")), default=0) if attempts.exists() else 1
    with Path(f"{run.folder}.{attempt}.log").open("w") as log:
        return Start(run, attempt, run.start(stdout=log))


@dataclass(frozen=True)
class Family:
    """The processes of a start, found before the moment to strike: looking takes longer than a save may."""

    start: Start
    ranks: list[psutil.Process]
    all: list[psutil.Process]

    def strike(self, kill: Kill) -> bool:
        """Kill, and wait for the end of the launcher; whether a save was cut short."""
        process = self.start.process
        victims = {"a rank": [self.ranks[kill.rank]], "the launcher": [], "all": self.ranks}
        if kill.target == "the launcher":  # its ranks hang, as on a host that does; later they go on
            for rank in self.ranks:
                signal_to(rank, signal.SIGSTOP)
        for victim in victims[kill.target]:
            signal_to(victim, signal.SIGKILL)
        if kill.target != "a rank":
            process.kill()
        left_of(victims[kill.target], seconds=60)
        cut_short = bool(self.start.unfinished)
        process.wait(timeout=LIMIT)  # of one killed rank: the launcher ends the other
        return cut_short


def family(start: Start) -> Family:
    """All processes of a start: its launcher, the children of that, which are the ranks, and their children."""
    launcher = psutil.Process(start.process.pid)
    ranks = launcher.children()
    assert len(ranks) == 2
    return Family(start, ranks, launcher.children(recursive=True))


def signal_to(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(new_run: Callable[..., Any]) -> None:
    settings = [*LARGE, f"steps={STEPS}"]
    whole = new_run("whole", ranks=2, overrides=settings, deepspeed=True)
    code, output = whole.finish(seconds=LIMIT)
    assert code == 0, output

    run = new_run("killed", ranks=2, overrides=settings)
    struck: Counter[str] = Counter()
    processes: list[psutil.Process] = []
    frozen: list[psutil.Process] = []
    outlived: list[Start] = []
    cut_short = 0

    def wake() -> None:
        while frozen:
            signal_to(frozen.pop(), signal.SIGCONT)

    try:
        for number, kill in enumerate(drawn(random.Random(SEED)), start=1):
            start = started(run)
            assert start.attempt == number
            start.until_begun()
            if kill.early:
                wake()
            members = family(start)
            processes += members.all
            start.until_killed(kill)
            wake()
            in_a_save = members.strike(kill)
            cut_short += in_a_save
            if kill.target == "the launcher":
                frozen += members.ranks
                outlived.append(start)
            struck[kill.moment] += 1
            struck[kill.target] += 1
            print(f"{time.strftime('%H:%M:%S')} attempt {number}: {kill} in a save: {in_a_save}", flush=True)
        last = started(run)
        last.until_begun()
        wake()
        assert last.process.wait(timeout=LIMIT) == 0, last.said
        left = left_of([*processes, *_those_of(run)], seconds=LIMIT)
        assert not left, "ranks that were superseded, or workers that lost their rank, did not end"
    finally:
        for process in [*processes, *_those_of(run)]:
            signal_to(process, signal.SIGKILL)
    for start in outlived:  # frozen and woken beside a newer attempt
        said = rf"superseded by attempt \d+: this run \(attempt {start.attempt}\) stops"
        assert re.search(said, start.log.read_text()), start.said
    assert sum(struck[target] for target in TARGETS) == KILLS
    assert all(struck[name] for name in (*MOMENTS, *TARGETS)), struck
    assert 4 * cut_short >= KILLS - 1, (cut_short, struck)  # the rest were whole just before the kill
    assert run.numbers() == whole.numbers()
    assert run.final_files() == whole.final_files()
    assert Counter(line["step"] for line in run.lines()) == Counter(range(1, STEPS + 1))
    assert 3 * len({line["attempt"] for line in run.lines()}) >= KILLS, "most starts came to nothing"
    assert (run.folder / "DONE").exists()
    assert not (run.folder / "FAILED").exists()
    _no_stray_folder_is_left(run.folder / "checkpoints")


def _those_of(run: Any) -> list[psutil.Process]:
    """The living processes of all starts of a run, loader workers too: they were started beside its folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.cwd() == str(run.folder.parent):
                found.append(process)
    return found


def _no_stray_folder_is_left(checkpoints: Path) -> None:
    folders = list(checkpoints.glob("step-*"))
    assert all((folder / "manifest.json").exists() for folder in folders)
    assert not list(checkpoints.parent.rglob("*.tmp"))
    assert len(folders) == 2  # checkpoint.keep
