"""What loader workers import is imported beside DeepSpeed, and only where there will be workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The fork server must run when the settings are resolved, which is what loads DeepSpeed.
_STAND_IN = """
import sys
from multiprocessing import forkserver
from beit_dist.commands import {command}
from beit_dist.engine import resolve
from beit_dist.errors import exit_cleanly

def stand_in(*_):
    print("runs", forkserver._forkserver._forkserver_pid is not None, "deepspeed" in sys.modules)
    raise SystemExit(0)

if __name__ == "__main__":
    resolve.resolve = stand_in
    exit_cleanly({command}.main)
"""


@pytest.mark.parametrize(
    ("command", "words", "runs"),
    [
        ("train", [], True),
        ("train", ["loader.workers=0"], False),
        ("train", ["--dry-run"], False),
        ("finetune", [], True),
    ],
)
def test_the_fork_server_is_started_before_deepspeed(
    command: str, words: list[str], runs: bool, tmp_path: Path
) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(_STAND_IN.format(command=command))
    given = ["--data", str(tmp_path), "--run", str(tmp_path / "run"), *words]
    done = subprocess.run([sys.executable, str(script), *given], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["runs", str(runs), "False"]
    assert not done.stderr
