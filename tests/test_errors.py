"""How commands end."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMAND = "from beit_dist.errors import exit_cleanly; exit_cleanly(lambda: print('224×224 \\udcff.jpg'))"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_the_terminal_cannot_show_does_not_stop_a_command(encoding: str) -> None:
    run = [sys.executable, "-c", COMMAND]
    done = subprocess.run(run, env={"PYTHONIOENCODING": encoding}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("224 \\udcff.jpg\n")


def test_a_command_whose_output_nobody_reads_ends_quietly() -> None:
    command = "from beit_dist.errors import exit_cleanly; exit_cleanly(lambda: print('x' * 100_000))"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate()
    assert (process.returncode, said) == (141, b"")
