"""One readable message for one failure: rank, host, cause; the ranks that fail because of it keep quiet."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.config.run import TimeoutsConfig
from beit_dist.engine.failure import Failure
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.ranks.timeouts import Timeouts
from beit_dist.engine.run_folder import FAILED, RunFolder
from beit_dist.errors import ConfigError, SampleError, TrainingError

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"
LIMIT = "timeouts.step_minutes=15"


def failure(error: BaseException, rank: int = 0) -> Failure:
    return Failure(error, Ranks(rank, 2, rank), LIMIT)


def test_the_first_failure_is_marked_and_said_and_the_next_points_to_it(tmp_path: Path) -> None:
    run, since = RunFolder(tmp_path), time.time()
    run.create()
    said = failure(SampleError("shard x is damaged"), rank=1).report(run, since)
    assert said == f"error: rank 1 on {socket.gethostname()}: shard x is damaged"
    later = failure(RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer"))
    said = later.report(run, since)
    assert said == f"rank 0 on {socket.gethostname()} stops: rank 1 on {socket.gethostname()} failed first"
    assert later.exit_code == 1
    assert "Connection closed" in (tmp_path / "ranks" / "rank-00000.error.txt").read_text()
    marker = json.loads((tmp_path / FAILED).read_text())
    assert (marker["rank"], marker["error"]) == (1, "shard x is damaged")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "Permission denied: a/b. Change its owner"),
        (OSError(28, "No space left on device", "a/b"), "No space left on device: a/b. Make room"),
        (OSError(28, "No space left on device"), "No space left on device: in raised(). Make room"),
    ],
)
def test_a_disk_that_refuses_is_no_traceback_but_in_the_marker(tmp_path: Path, error: OSError, said: str) -> None:
    def raised() -> None:
        raise error

    run = RunFolder(tmp_path)
    with pytest.raises(OSError, match=str(error.strerror)):
        raised()
    output = failure(error).report(run, time.time())
    assert said in output
    assert "Traceback" not in output
    assert "Traceback" in json.loads((tmp_path / FAILED).read_text())["traceback"]


def test_what_all_ranks_find_is_said_once_and_with_its_exit_code(tmp_path: Path) -> None:
    run, since = RunFolder(tmp_path), time.time()
    run.create()
    error = ConfigError("model.depth", 3, "2")
    first, second = failure(error), failure(error, rank=1)
    assert first.report(run, since)
    assert second.report(run, since) == ""
    assert second.exit_code == 2
    follower = failure(RuntimeError("NCCL error: remote process exited"), rank=1)
    follower.report(run, since)
    assert follower.exit_code == 2  # whichever rank the launcher looks at: no retry helps


def test_the_marker_of_an_earlier_start_is_replaced(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    failure(SampleError("old")).report(run, time.time())
    time.sleep(0.01)
    assert "new" in failure(SampleError("new")).report(run, time.time())
    assert json.loads((tmp_path / FAILED).read_text())["error"] == "new"


def test_the_marker_of_an_earlier_start_is_replaced_when_the_clock_was_put_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    failure(SampleError("old")).report(run, time.time())
    assert "new" in failure(SampleError("new")).report(run, time.time() - 3600)
    assert json.loads((tmp_path / FAILED).read_text())["error"] == "new"


def test_details_go_into_the_marker_only(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    said = failure(TrainingError("text", [{"samples": [1, 2]}])).report(run, time.time())
    assert "samples" not in said
    assert json.loads((tmp_path / FAILED).read_text())["details"] == [{"samples": [1, 2]}]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("[gloo/unbound_buffer.cc:78] Timed out waiting 3000ms for recv", f"did not answer within {LIMIT}"),
        ("Application timeout caused pair closure", f"did not answer within {LIMIT}"),
        (
            "[gloo/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer",
            "connection to another rank broke",
        ),
        (
            "The server socket has failed to listen on any local network address. port: 2, EADDRINUSE, message: "
            "address already in use (gloo)",
            "another --master_port",
        ),
        (
            "The server socket has failed to bind. port: 99, name: EACCES, message: permission denied (gloo)",
            "is reserved for the system",
        ),
        ("[gloo/pair.cc:5] Connection closed by peer [::1]:2", "connection to another rank broke"),
        (
            "The client socket has timed out after 4000ms while trying to connect to (a, 1). (gloo)",
            "did not all meet",
        ),
        ("Timed out after 5 seconds waiting for clients. 1/2 clients joined. (gloo)", "Every rank must have been"),
        ("Ping failed, invalid value returned from server. Expected: 1, Got: 2 (gloo)", "no other program uses"),
    ],
)
def test_what_collectives_say_is_put_in_words(said: str, meant: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    text = failure(RuntimeError(said)).report(run, time.time())
    assert meant in text
    assert said in text
    assert "Traceback" not in text
    assert said in json.loads((tmp_path / FAILED).read_text())["traceback"]


def test_an_error_of_the_program_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError) as caught:
        raise TimeoutError("a socket timed out")
    assert "Traceback" in failure(caught.value).text


def test_time_limits_are_long_then_short_then_long_enough_for_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(
        "beit_dist.engine.ranks.timeouts.set_timeouts", lambda limit: seen.append(limit.total_seconds() / 60)
    )
    timeouts = Timeouts(TimeoutsConfig(start_minutes=30, step_minutes=11), save_seconds=1800)
    assert timeouts.start.total_seconds() == 1800
    assert timeouts.now == "timeouts.start_minutes=30"
    with timeouts.saving():
        assert seen.pop() == 41
    assert seen.pop() == 30
    timeouts.step_ended()
    timeouts.step_ended()
    assert seen == [11]
    assert timeouts.now == "timeouts.step_minutes=11"
    with timeouts.saving():
        pass
    assert seen == [11, 41, 11]


def test_a_step_may_take_as_long_as_its_data() -> None:
    with pytest.raises(ConfigError, match=r"timeouts.step_minutes: got 1.0, expected more than loader.timeout"):
        load_recipe(PretrainingConfig, None, ["run=r", "timeouts.step_minutes=1"])


@pytest.mark.slow
def test_a_rank_that_stops_answering_ends_the_other_within_the_short_limit(new_run: Callable[..., Any]) -> None:
    settings = ["loader.workers=0", "loader.timeout_seconds=3", "timeouts.step_minutes=0.1", "steps=4000"]
    run = new_run("run", ranks=2, overrides=[*settings, "watchdog.stall_seconds=2", "checkpoint.every_steps=null"])
    process = run.start()
    stopped = None
    try:
        assert until(lambda: len(run.lines()) > 3 or process.poll() is not None)
        stopped = run.facts()["ranks"][1]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        assert until(lambda: (run.folder / FAILED).exists())
    finally:
        if stopped is not None:
            os.kill(stopped, signal.SIGCONT)
            os.kill(stopped, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    failed = json.loads((run.folder / FAILED).read_text())
    assert failed["rank"] == 0
    assert "another rank did not answer within timeouts.step_minutes=0.1" in failed["error"]
    assert f"error: rank 0 on {socket.gethostname()}: another rank did not answer" in output
    assert "Traceback" not in output
    stacks = (run.folder / "ranks" / "rank-00000.stacks.txt").read_text()
    assert "no step has ended for" in stacks
    assert "trainer.py" in stacks


@pytest.mark.slow
def test_a_port_that_is_taken_is_named_with_the_way_out(new_run: Callable[..., Any]) -> None:
    run = new_run("run", ranks=2, deepspeed=True)
    command = run.command()
    port = command[command.index("--master_port") + 1]
    run.command = lambda *overrides: [*command, *overrides]
    with socket.create_server(("", int(port))):
        code, output = run.finish()
    assert code != 0
    assert f"error: rank 0 on {socket.gethostname()}: port {port} of this host" in output
    assert "Give the launcher another --master_port" in output
    assert "Traceback" not in output


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 120
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def torchrun(run: Any) -> None:
    """Let the run be started by torchrun instead."""
    command = run.command

    def start(*overrides: str) -> list[str]:
        line = command(*overrides)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(run.ranks)]
        launcher += [
            "--master-port",
            line[line.index("--master_port") + 1],
            "--signals-to-handle",
            "SIGTERM,SIGUSR1",
        ]
        entry = ["-m", "beit_dist.train"] if run.entry == TRAIN else [str(run.entry)]
        return [*launcher, *entry, *line[line.index(str(run.entry)) + 1 :]]

    run.command = start


@pytest.mark.slow
def test_a_rank_that_fails_is_named_once_and_takes_the_others_with_it(new_run: Callable[..., Any]) -> None:
    """Rank 2 of 4 fails by itself in step 4, of 4000, between blocks whose weights all ranks gather together."""
    ds = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    run = new_run("run", ds, ranks=4, overrides=["loader.workers=0", "steps=4000"], deepspeed=True)
    run.entry = run.folder.parent / "failing.py"
    run.entry.write_text(
        "import os, runpy\n"
        "from beit_dist.errors import SampleError\n"
        "from beit_dist.models.vit import Block\n"
        "forward, calls = Block.forward, []\n"
        "def fail(self, *inputs):\n"
        "    calls.append(None)\n"
        "    if os.environ['RANK'] == '2' and len(calls) == 2 * 4:\n"
        "        raise SampleError('shard x cannot be read')\n"
        "    return forward(self, *inputs)\n"
        "Block.forward = fail\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    torchrun(run)
    code, output = run.finish()
    assert code == 1
    host = socket.gethostname()
    assert output.count(f"error: rank 2 on {host}: shard x cannot be read") == 1
    assert output.count("error: rank") == 1
    for rank in (0, 1, 3):  # by themselves, though they were in a collective
        assert output.count(f"rank {rank} on {host} stops: rank 2 on {host} failed first") == 1, output
    assert len(run.lines()) == 3
    failed = json.loads((run.folder / FAILED).read_text())
    assert (failed["rank"], failed["exit_code"], failed["error"]) == (2, 1, "shard x cannot be read")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_passes_on_a_stop(new_run: Callable[..., Any], number: signal.Signals) -> None:
    run = new_run(
        "run", ranks=2, overrides=["loader.workers=0", "steps=4000", "checkpoint.every_steps=null"], deepspeed=True
    )
    torchrun(run)
    process = run.start()
    assert until(lambda: len(run.lines()) > 3 or process.poll() is not None)
    process.send_signal(number)  # to torchrun, which passes it to the ranks
    output, _ = process.communicate(timeout=120)
    stopped = json.loads((run.folder / "PREEMPTED").read_text())
    assert stopped["reason"] == number.name, output
    assert not (run.folder / FAILED).exists()
    assert list(run.folder.glob(f"checkpoints/step-{stopped['step']:08d}.*/manifest.json"))
