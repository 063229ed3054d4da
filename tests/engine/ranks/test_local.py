"""``--ranks N`` starts ranks that belong together: they start, are signalled and end as one."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from support.processes import left_of
from support.terminal import Terminal

from beit_dist.commands.options import number_of_ranks
from beit_dist.engine.ranks import local
from beit_dist.errors import ConfigError

BEGINNING = """\
import os, pathlib, signal, sys, time
from beit_dist.engine.ranks.local import started_here
code = started_here(2, dry_run=False)
if code is not None:
    sys.exit(code)
rank = os.environ["RANK"]
"""


SLOW = """\
import os, pathlib, time
if "RANK" in os.environ:
    pathlib.Path("at-" + os.environ["RANK"]).touch()
    time.sleep(1)
"""


@pytest.fixture(autouse=True)
def _outside_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def command(tmp_path: Path, program: str) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(BEGINNING + program)
    return [sys.executable, str(path)]


def run(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(tmp_path, program), capture_output=True, text=True, timeout=60, cwd=tmp_path)


def until(condition: Path | Sequence[Path]) -> None:
    paths, end = [condition] if isinstance(condition, Path) else condition, time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.01)


def test_each_rank_knows_its_place_and_has_its_share_of_the_cores(tmp_path: Path) -> None:
    names = "'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'OMP_NUM_THREADS'"
    found = run(tmp_path, f"pathlib.Path(rank).write_text(' '.join(os.environ[name] for name in ({names})))")
    assert found.returncode == 0, found.stderr
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert found.stdout == f"2 ranks on this machine, each of {threads} CPU threads (OMP_NUM_THREADS)\n"
    assert [(tmp_path / name).read_text() for name in "01"] == [
        f"0 0 2 2 127.0.0.1 {threads}",
        f"1 1 2 2 127.0.0.1 {threads}",
    ]


def test_ranks_meet_at_a_port_that_nobody_else_can_take(tmp_path: Path) -> None:
    meet = (
        "from datetime import timedelta\n"
        "from beit_dist.engine.ranks.distributed import Ranks, _store\n"
        "from beit_dist.engine.ranks.rendezvous import meeting_point\n"
        "ranks = Ranks(int(rank), 2, int(rank))\n"
        "store = _store(ranks, timedelta(minutes=1), meeting_point(ranks))\n"
        "store.add('here', 1)\n"
        "while store.add('here', 0) < 2: time.sleep(0.01)\n"
        "if rank == '0': time.sleep(0.5)\n"  # it holds the store
        "pathlib.Path(f'met-{rank}').touch()\n"
    )
    # the port is held before rank 0 has begun to import anything
    held = (
        "import socket\n"
        "try: socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT'])))\n"
        "except OSError: pathlib.Path(f'held-{rank}').touch()\n"
    )
    found = run(tmp_path, held + meet)
    assert found.returncode == 0, found.stderr
    assert all((tmp_path / f"{what}-{rank}").exists() for what in ("met", "held") for rank in "01")


def test_the_exit_code_is_that_of_the_rank_that_failed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "sys.exit(2 if rank == '1' else time.sleep(0.5) or 1)").returncode == 2
    killed = run(tmp_path, "time.sleep(0.5) if rank == '0' else os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == 128 + signal.SIGKILL
    assert killed.stderr == "rank 1 was ended by SIGKILL: did the host run out of memory?\n"


def test_ranks_that_do_not_notice_a_failure_are_told_and_then_killed(tmp_path: Path) -> None:
    limits = "from beit_dist.engine.ranks import local\nlocal._NOTICE = local._END = 0.5\n"
    told = "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path('told').touch())\nwhile True: time.sleep(1)\n"
    path = tmp_path / "program.py"
    path.write_text(limits + BEGINNING + "if rank == '1': sys.exit(3)\n" + told)
    found = subprocess.run([sys.executable, str(path)], cwd=tmp_path, timeout=60)
    assert found.returncode == 3
    assert (tmp_path / "told").exists()


def test_ctrl_c_reaches_each_rank_once_and_the_prompt_comes_back_after_the_last(tmp_path: Path) -> None:
    program = (
        "note = lambda number, _: pathlib.Path(f'got-{rank}').open('a').write(signal.Signals(number).name + ' ')\n"
        "signal.signal(signal.SIGINT, note)\n"
        "assert os.isatty(1)\n"
        "pathlib.Path(f'ready-{rank}').touch()\n"
        "while not pathlib.Path(f'got-{rank}').exists(): time.sleep(0.01)\n"
        "time.sleep(1 + int(rank))\n"
        "print('rank', rank, 'has ended')\n"
    )
    with Terminal(command(tmp_path, program), cwd=tmp_path) as terminal:
        terminal.until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in "01"))
        terminal.ctrl_c()
        assert terminal.end() == 0
        assert "rank 1 has ended" in terminal.shown
        assert "Traceback" not in terminal.shown
    assert [(tmp_path / f"got-{rank}").read_text() for rank in "01"] == ["SIGINT "] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_the_command_alone_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        f"signal.signal({int(number)}, lambda *_: sys.exit(0))\n"
        "pathlib.Path(f'ready-{rank}').touch()\n"
        "while True: time.sleep(1)\n"
    )
    process = subprocess.Popen(command(tmp_path, program), cwd=tmp_path)
    until([tmp_path / f"ready-{rank}" for rank in "01"])
    process.send_signal(number)
    assert process.wait(timeout=30) == 0


def test_ctrl_c_during_the_imports_is_one_word_and_no_traceback(tmp_path: Path) -> None:
    with Terminal(
        command(tmp_path, "pathlib.Path(f'at-{rank}').touch()\nimport torch\ntime.sleep(60)\n"), cwd=tmp_path
    ) as terminal:
        terminal.until(lambda: all((tmp_path / f"at-{rank}").exists() for rank in "01"))
        terminal.ctrl_c()
        assert terminal.end() == 130
        assert terminal.shown.count("interrupted") == 1
        assert "Traceback" not in terminal.shown


def test_ctrl_c_before_a_rank_can_take_it_waits_for_it(tmp_path: Path) -> None:
    """Python itself starts for some 50 ms, in which Ctrl-C would be a traceback."""
    path = tmp_path / "program.py"
    path.write_text(SLOW + BEGINNING + "time.sleep(60)\n")
    with Terminal([sys.executable, str(path)], cwd=tmp_path) as terminal:
        terminal.until(lambda: all((tmp_path / f"at-{rank}").exists() for rank in "01"))
        terminal.ctrl_c()
        assert terminal.end() == 130
        assert terminal.shown.count("interrupted") == 1
        assert "Traceback" not in terminal.shown


def test_ranks_end_with_the_command_even_if_it_is_killed(tmp_path: Path) -> None:
    program = "pathlib.Path(f'ready-{rank}').touch()\nwhile True: time.sleep(1)\n"
    process = subprocess.Popen(command(tmp_path, program), cwd=tmp_path)
    until([tmp_path / f"ready-{rank}" for rank in "01"])
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    process.wait()
    assert not left_of(ranks, 10)


def test_so_do_ranks_that_had_not_begun_when_it_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(SLOW + BEGINNING + "time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, str(path)], cwd=tmp_path)
    until([tmp_path / f"at-{rank}" for rank in "01"])
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert not left_of(ranks, 10)


def test_the_number_of_ranks_is_a_number_or_auto() -> None:
    assert (number_of_ranks("4"), number_of_ranks("auto")) == (4, "auto")
    for wrong in ("0", "-1", "two", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number of ranks from 1, or auto"):
            number_of_ranks(wrong)


def test_auto_is_a_rank_for_each_gpu_and_one_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert local.how_many("auto", 1) == 4
    assert local.how_many("auto", 1, "cpu") == 1
    assert (local.how_many(3, 1), local.how_many(None, 8)) == (3, 8)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local.how_many("auto", 1) == 1


def test_a_launcher_says_how_many_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local, "run_ranks", lambda *_: pytest.fail("it starts ranks inside a rank"))
    monkeypatch.setattr(local, "end_at_interrupt", lambda: None)
    assert local.started_here(4, dry_run=False) is None
    assert local.started_here("auto", dry_run=False) is None
    assert local.started_here(2, dry_run=True) is None
    with pytest.raises(ConfigError, match="--ranks: got 2, expected 4, as many as the launcher has started"):
        local.started_here(2, dry_run=False)
