"""A stop request is noted, not acted on; a second signal ends the process; ranks that wait learn of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.engine.ranks.preemption import MAX_MINUTES, STOP_SIGNALS, StopRequest

STOP = "beit_dist/stop"  # what the ranks look for on the board
TRAIN = Path(__file__).parents[3] / "beit_dist" / "train.py"


class Board(dict[str, str]):
    """The ranks' store, for one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_is_only_noted(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = signal.getsignal(number)
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # also when the tests run under nohup
    stop = StopRequest().install()
    stop.share(None)
    try:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.name == number.name
        os.kill(os.getpid(), number)  # at once again: schedulers send it twice
        assert stop.name == number.name
    finally:
        stop.close()
        monkeypatch.undo()
    assert signal.getsignal(number) == previous
    assert signal.set_wakeup_fd(-1) == -1


def ended(program: str) -> subprocess.CompletedProcess[str]:
    lines = "import os, signal, time\nfrom beit_dist.engine.ranks.preemption import StopRequest\n"
    return subprocess.run([sys.executable, "-c", lines + program], capture_output=True, text=True, timeout=60)


def test_a_later_second_signal_ends_at_once() -> None:
    result = ended(
        "StopRequest(grace=0.1).install().share(None)\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); print('still here')\n"
    )
    assert result.returncode == 128 + signal.SIGTERM
    assert "still here" not in result.stdout


def test_a_signal_of_the_terminal_that_is_ignored_stays_ignored() -> None:
    result = ended(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "stop = StopRequest(grace=0.0).install(); stop.share(None)\n"
        "for _ in range(3): os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.05)\n"
        "print(stop.requested); stop.close(last=True); print(signal.getsignal(signal.SIGHUP).name)\n"
    )
    assert result.stdout.split() == ["False", "SIG_IGN"]
    assert result.returncode == 0


def test_a_second_signal_ends_a_process_that_cannot_run_handlers() -> None:
    result = ended(
        "import ctypes, threading\n"
        "StopRequest(grace=0.1).install().share(None)\n"
        "def send():\n"
        "    while True: time.sleep(0.3); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "threading.Thread(target=send).start()\n"
        "mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)\n"
        "libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)  # for ever, and in C\n"
        "print('still here')\n"
    )
    assert result.returncode == 128 + signal.SIGUSR1
    assert "still here" not in result.stdout


def test_a_signal_while_the_ranks_join_ends_the_process_when_they_do_not() -> None:
    result = ended(
        "StopRequest(patience=0.2).install()\nos.kill(os.getpid(), signal.SIGTERM); time.sleep(30); print('no')\n"
    )
    assert result.returncode == 128 + signal.SIGTERM
    assert "SIGTERM on" in result.stderr
    assert "nothing was done" in result.stderr


def acknowledged(program: str) -> list[str]:
    found = ended(
        "stop = StopRequest()\nstop.then = lambda: 'stopping after step 7'\n"
        f"{program}\ntime.sleep(1)\nprint(stop.name); stop.close()\n"
    )
    assert found.returncode == 0, found.stderr
    return found.stderr.splitlines()


def test_a_stop_is_acknowledged_at_once_with_what_follows_and_how_to_stop_sooner() -> None:
    program = "stop.install().share(None); os.kill(os.getpid(), signal.{})"
    said = "SIGINT: stopping after step 7. Press Ctrl-C again after 5 s to stop without saving."
    assert acknowledged(program.format("SIGINT")) == [said]
    said = "SIGTERM: stopping after step 7. Send it again after 5 s to stop without saving."
    assert acknowledged(program.format("SIGTERM") + "; os.kill(os.getpid(), signal.SIGTERM)") == [said]
    clock = "stop = StopRequest(max_minutes=1e-3).install(); stop.share(None)"
    assert acknowledged(clock) == ["max_minutes: stopping before the first step."]


def test_so_is_one_during_the_start() -> None:
    assert ended(
        "stop = StopRequest().install()\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.5); stop.close()"
    ).stderr.startswith("SIGINT: stopping before the first step.")


def test_the_second_request_says_that_nothing_is_saved() -> None:
    result = ended(
        "StopRequest(grace=0.1).install().share(None)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(0.3); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    )
    assert result.returncode == 130
    assert result.stderr.splitlines()[1:] == ["SIGINT again: stopped without saving"]


def test_one_rank_acknowledges_for_all_and_any_where_rank_0_got_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "set_wakeup_fd", lambda *_, **__: -1)  # one process has only one
    board = Board()
    first, other, third = (StopRequest(rank).install() for rank in (0, 1, 2))
    try:
        for stop in (first, other, third):
            stop.share(board)
        for stop in (other, third):
            os.write(stop._ends[1], bytes([signal.SIGTERM]))  # type: ignore[index]
        time.sleep(1.5)
        assert capsys.readouterr().err.count("SIGTERM: ") == 1
        board.clear()
        joining = [StopRequest(rank).install() for rank in (0, 1)]
        for stop in joining:
            os.write(stop._ends[1], bytes([signal.SIGINT]))  # type: ignore[index]
        time.sleep(1)
        for stop in reversed(joining):  # rank 0 is the last to join
            stop.share(board)
            time.sleep(1)
        assert capsys.readouterr().err.count("SIGINT: ") == 1
    finally:
        for stop in (first, other, third):
            stop.close()


def test_a_signal_is_told_to_ranks_that_wait() -> None:
    board = Board()
    ours, waiting = StopRequest().install(), StopRequest()
    ours.share(board)
    waiting.share(board)
    try:
        assert not waiting.known
        os.kill(os.getpid(), signal.SIGUSR1)
        until = time.monotonic() + 30
        while not waiting.known and time.monotonic() < until:
            time.sleep(0.01)
        assert waiting.known
        assert not waiting.requested  # it was not asked itself: at the boundary the sum decides
    finally:
        ours.close()


def test_a_request_before_the_ranks_joined_is_told_when_they_have() -> None:
    board, stop = Board(), StopRequest().install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.share(board)
        assert STOP in board
    finally:
        stop.close()


def test_a_lost_store_is_no_stop() -> None:
    class Lost(Board):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("connection reset")

    stop = StopRequest()
    stop.share(Lost())
    assert not stop.known


def test_the_clock_is_looked_at_while_the_main_thread_waits() -> None:
    board, stop = Board(), StopRequest(max_minutes=0.1 / 60).install()
    stop.share(board)
    until = time.monotonic() + 30
    while STOP not in board and time.monotonic() < until:
        time.sleep(0.01)
    stop.close()
    assert stop.name == MAX_MINUTES
    assert STOP in board


def test_the_clock_asks_to_stop_by_name() -> None:
    assert not StopRequest(max_minutes=5).requested
    board, stop = Board(), StopRequest(max_minutes=1e-9)
    stop.share(board)
    assert stop.requested
    assert stop.name == MAX_MINUTES
    assert STOP in board


@pytest.mark.slow
def test_a_signal_that_is_repeated_while_the_process_ends_does_not_change_its_exit_code(
    new_run: Callable[..., Any],
) -> None:
    run = new_run("run", overrides=["loader.workers=0", "steps=7"])
    run.entry = run.folder.parent / "signalled.py"
    run.entry.write_text(
        "import atexit, os, runpy, signal\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    code, output = run.finish()
    assert code == 0, output
    assert (run.folder / "DONE").exists()


@pytest.mark.slow
@pytest.mark.parametrize("asked_by", ["signal", "clock"])
def test_a_rank_that_waits_for_data_stops_with_the_others(new_run: Callable[..., Any], asked_by: str) -> None:
    """Rank 1 gets no more data from its 12th batch on; only rank 0 is asked to stop."""
    run = new_run("run", ranks=2, overrides=["steps=20", "loader.workers=0"])
    run.entry = run.folder.parent / "stuck.py"
    run.entry.write_text(
        "import os, runpy, time\n"
        "from beit_dist.stream.batches import RankBatches\n"
        "assemble = RankBatches._assemble\n"
        "def stuck(self, parts, buffer, consumed):\n"
        "    while os.environ['RANK'] == '1' and consumed >= 11 * self.per_lane and not self._closing:\n"
        "        time.sleep(0.05)\n"
        "    return assemble(self, parts, buffer, consumed)\n"
        "RankBatches._assemble = stuck\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    if asked_by == "signal":
        code, output = run.signal_at(10, signal.SIGTERM)
    else:
        code, output = run.finish("max_minutes=0.25")
    assert code == 0, output
    stopped = json.loads((run.folder / "PREEMPTED").read_text())
    assert stopped["step"] == len(run.lines()) <= 11
    assert stopped["reason"] == ("SIGTERM" if asked_by == "signal" else MAX_MINUTES)
    saved = json.loads(
        next(run.folder.glob(f"checkpoints/step-{stopped['step']:08d}.*/manifest.json")).read_text()
    )
    assert saved["position"]["samples"] == 16 * stopped["step"]


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_one_under_nohup_goes_on(new_run: Callable[..., Any]) -> None:
    overrides = ["loader.workers=1", "steps=4000", "checkpoint.every_steps=null"]
    run = new_run("run", overrides=overrides, forked=False)
    ours, its = os.openpty()
    os.set_blocking(ours, False)
    process = run.start(
        stdin=its, stdout=its, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    )
    os.close(its)
    shown = b""
    while len(run.lines()) < 3:
        assert process.poll() is None, shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(ours, 2**16)
        time.sleep(0.01)
    os.close(ours)
    assert process.wait(timeout=120) == 0
    stopped = json.loads((run.folder / "PREEMPTED").read_text())
    assert stopped["reason"] == "SIGHUP"
    assert list(run.folder.glob(f"checkpoints/step-{stopped['step']:08d}.*/manifest.json"))
    assert not (run.folder / "FAILED").exists()

    command, steps = run.command(), stopped["step"] + 20
    run.command = lambda *_: ["nohup", *command, f"steps={steps}"]
    process = run.start(stdin=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(run.lines()) < stopped["step"] + 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert json.loads((run.folder / "DONE").read_text())["step"] == steps
