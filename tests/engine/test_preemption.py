"""A stop signal is noted, not acted on; a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from beit_dist.engine.preemption import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_is_only_noted(number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    stop = StopRequest().install()
    try:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.name == number.name
        os.kill(os.getpid(), number)  # at once again: schedulers send it twice
        assert stop.name == number.name
    finally:
        stop.close()
    assert signal.getsignal(number) == previous


def test_a_later_second_signal_ends_at_once() -> None:
    program = (
        "import os, signal, time\n"
        "from beit_dist.engine.preemption import StopRequest\n"
        "StopRequest(grace=0.1).install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "still here" not in ended.stdout
