"""A forked process is what a new one would be, and ranks that are forked end as those of a launcher do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import forked
from support.forked import Forked
from support.processes import left_of
from support.runs import wait

LOOKS = """\
import json, multiprocessing.spawn, os, random, signal, sys, tempfile, threading
main = sys.modules["__main__"]
print(json.dumps({
    "open": sorted(n for n in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{n}")),
    "arguments": sys.argv,
    "as typed": sys.orig_argv,
    "folder": os.getcwd(),
    "path": sys.path,
    "variables": {k: v for k, v in os.environ.items() if k not in ("_", "LC_CTYPE")},
    "known to C": os.popen("env | grep ^OWN=").read(),
    "signals": {n: str(signal.getsignal(n)).partition(" at ")[0] for n in range(1, 32) if n not in (9, 19)},
    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "streams": [[f.fileno(), f.encoding, f.errors, f.line_buffering, f.isatty()] for f in (sys.stdout, sys.stderr)],
    "input": sys.stdin.read(),
    "threads": [thread.name for thread in threading.enumerate()],
    "tasks": len(os.listdir("/proc/self/task")),
    "main": [main.__name__, main.__file__, str(main.__spec__), multiprocessing.spawn.get_preparation_data("w")["init_main_from_path"]],
    "temporary": tempfile.gettempdir(),
    "session is its own": os.getsid(0) == os.getpid(),
    "umask": os.umask(0),
}))
sys.exit(7)
"""  # noqa: E501


def program(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(text)
    return str(path)


def test_a_forked_process_is_as_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "own"))
    monkeypatch.setenv("OWN", "yes")
    words = [program(tmp_path, LOOKS), "--word", "x=1"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    code, output = wait(started)
    expected = json.loads(output)
    assert (code, expected["known to C"], expected["tasks"]) == (7, "OWN=yes\n", 1)
    code, output = wait(Forked(words, os.environ, tmp_path, start_new_session=True))
    found = json.loads(output)
    assert code == 7
    assert {name: (expected[name], found[name]) for name in expected if expected[name] != found[name]} == {}


def test_two_that_run_at_once_are_two_and_end_as_they_are_told(tmp_path: Path) -> None:
    text = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"
    both = [Forked([program(tmp_path, text)], os.environ, tmp_path) for _ in range(2)]
    assert [int(one.stdout.readline()) for one in both if one.stdout] == [one.pid for one in both]
    assert [one.poll() for one in both] == [None, None]
    with pytest.raises(subprocess.TimeoutExpired):
        both[0].communicate(timeout=0.05)
    both[0].kill()
    both[1].terminate()
    assert [one.wait(60) for one in both] == [-signal.SIGKILL, -signal.SIGTERM]
    assert [one.communicate() for one in both] == [("", None)] * 2


def test_an_error_has_its_traceback_and_the_end_its_handlers(tmp_path: Path) -> None:
    text = "import atexit, threading, time\natexit.register(print, 'at exit')\n"
    text += "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\nraise KeyError('x')\n"
    code, output = wait(Forked([program(tmp_path, text)], os.environ, tmp_path))
    assert code == 1
    assert "KeyError: 'x'" in output
    assert output.split("KeyError: 'x'")[1].split() == ["thread", "at", "exit"]


def test_a_rank_that_fails_ends_the_others_and_its_exit_code_is_that_of_all(tmp_path: Path) -> None:
    text = "import os, sys, time\nfrom pathlib import Path\nrank = os.environ['RANK']\n"
    text += "Path(f'{rank}.pid').write_text(str(os.getpid()))\n"
    text += "while not all(Path(f'{n}.pid').exists() for n in range(int(os.environ['WORLD_SIZE']))): pass\n"
    text += "sys.exit(5) if rank == '1' else time.sleep(600)\n"
    process = Forked([program(tmp_path, text)], os.environ, tmp_path, ranks=3, port=9)
    until = time.monotonic() + 60
    while not all((tmp_path / f"{rank}.pid").exists() for rank in range(3)):
        assert time.monotonic() < until
    found = [int((tmp_path / f"{rank}.pid").read_text() or 0) for rank in range(3)]
    assert process.wait(60) == 5
    assert not left_of([psutil.Process(pid) for pid in found if pid and psutil.pid_exists(pid)], 10)


def test_a_variable_that_imports_have_read_cannot_be_another_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PYTHONHASHSEED: read before a fork"):
        Forked(["x.py"], os.environ | {"PYTHONHASHSEED": "3"}, tmp_path)


def test_a_server_that_fails_is_no_process_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server.py").write_text("import sys\nsys.exit('no')\n")
    monkeypatch.setattr(forked, "_SERVER", tmp_path / "server.py")
    monkeypatch.setattr(forked, "_server", forked._server.__wrapped__)
    with pytest.raises((ChildProcessError, BrokenPipeError, ConnectionResetError)):
        Forked(["x.py"], os.environ, tmp_path)
