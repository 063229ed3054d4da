"""TensorBoard and Weights & Biases get the numbers, no secrets, and cannot stop a run."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.records import a_recorder, sums_of, taken

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.sinks import Sinks, TensorBoardSink, check_packages, open_sinks
from beit_dist.errors import ConfigError
from beit_dist.step_numbers import Baseline, KnownBaselines


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self, fails: bool = False) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.fails = fails

    def write(self, step: int, numbers: Any) -> None:
        if self.fails:
            raise OSError("no route to host")
        self.lines.append((step, dict(numbers)))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package, which notes what it is given."""
    seen: Any = types.SimpleNamespace(starts=[], logged=[], finished=0)

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            seen.logged.append((step, numbers))

        def finish(self) -> None:
            seen.finished += 1

    def init(**settings: Any) -> Run:
        seen.starts.append(settings)
        return Run()

    module: Any = types.ModuleType("wandb")
    module.init, module.Settings = init, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_a_recorder_feeds_its_sinks_every_step(tmp_path: Path) -> None:
    run, kept = RunFolder(tmp_path), Kept()
    known = KnownBaselines({"loss": [Baseline("frequency", 1.5)]})
    recorder = a_recorder(run, every=2, sinks=Sinks([kept]), baselines=known)
    for step in (1, 2):
        loss = 14.0 if step == 1 else float("nan")
        recorder.add(taken(step), sums_of(loss), None, 0.5)
    recorder.flush()
    recorder.close()
    losses = [(step, numbers.get("train/loss")) for step, numbers in kept.lines if "train/lr" in numbers]
    assert losses == [(1, 2.0), (2, None)]
    name = "train/loss (frequency)"
    assert [(step, numbers[name]) for step, numbers in kept.lines if name in numbers] == [(1, 1.5), (2, 1.5)]
    assert any("speed/samples_per_second" in numbers for _, numbers in kept.lines)
    assert kept.closed


def test_a_sink_that_fails_is_given_up_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, kept = Kept(fails=True), Kept()
    sinks = Sinks([broken, kept])
    sinks.write(1, {"train/loss": 1.0})
    sinks.write(2, {"train/loss": 0.5})
    assert [step for step, _ in kept.lines] == [1, 2]
    assert caplog.text.count("Kept failed and is no longer used: no route to host") == 1


def test_wandb_gets_the_same_run_again_and_no_place_of_a_file(wandb: Any, tmp_path: Path) -> None:
    secret = "s3://a-secret-bucket/shards"
    config = PretrainingConfig(
        run=str(tmp_path), data=secret, init_from=secret, logging={"wandb": "offline"}, model={"size": "tiny"}
    )
    for _ in range(2):
        sinks = open_sinks(config, tmp_path, 0)
        sinks.write(3, {"train/loss": 2.0})
        sinks.close()
    first, second = wandb.starts
    assert first["id"] == second["id"]
    assert (first["mode"], first["dir"], first["resume"]) == ("offline", str(tmp_path), "allow")
    assert first["config"]["model"]["width"] == 192
    assert "secret" not in repr(wandb.starts)
    assert wandb.logged == [(3, {"train/loss": 2.0})] * 2
    assert wandb.finished == 2


def test_wandb_that_cannot_be_reached_at_the_start_does_not_stop_a_run(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    open_sinks(PretrainingConfig(run=str(tmp_path), logging={"wandb": "online"}), tmp_path, 0).write(
        1, {"train/loss": 1.0}
    )
    assert "logging.wandb could not be opened and is not used: no API key configured" in caplog.text


@pytest.mark.parametrize(
    ("setting", "module", "extra"),
    [
        ({"wandb": "online"}, "wandb", r"pip install 'beit_dist\[wandb\]'"),
        ({"tensorboard": True}, "torch.utils.tensorboard", r"pip install 'beit_dist\[tensorboard\]'"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_starts(
    setting: dict[str, Any], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    check_packages(PretrainingConfig(run="r"))
    with pytest.raises(ConfigError, match=extra):
        check_packages(PretrainingConfig(run="r", logging=setting))


def test_tensorboard_that_cannot_be_written_at_the_start_does_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()
    config = PretrainingConfig(run=str(tmp_path), logging={"tensorboard": True})
    open_sinks(config, tmp_path, 0).close()
    assert "logging.tensorboard could not be opened and is not used" in caplog.text


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps, loss in ((0, (1, 2, 3), 3.0), (2, (3, 4), 2.0)):
        sink = TensorBoardSink(tmp_path, start)
        for step in steps:
            sink.write(step, {"train/loss": loss})
        sink.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    found = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert found == [(1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0)]


_STARTS = """\
import sys
from pathlib import Path
import psutil
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.sinks import open_sinks

run = Path(sys.argv[1])
config = PretrainingConfig(run=str(run), logging={"wandb": "offline", "tensorboard": True})
for first, killed in ((1, False), (3, False), (5, True)):
    sinks = open_sinks(config, run, first - 1)
    for step in range(first, first + 3):
        sinks.write(step, {"train/loss": 3 - step / 8})
        if killed:
            for process in psutil.Process().children(recursive=True):
                process.kill()
                process.wait()
    sinks.close()
print("went on", flush=True)
"""


@pytest.mark.slow
def test_the_real_packages_write_files_and_call_nobody(tmp_path: Path) -> None:
    """Three starts: a first, one that does step 3 again, and one under which wandb's own process is killed."""
    pytest.importorskip("wandb", reason="pip install wandb")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run, home = tmp_path / "run", tmp_path / "home"
    for folder in (run, home):
        folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), address)
        done = subprocess.run(
            [sys.executable, "-c", _STARTS, str(run)],
            env={**environment, **proxies, "no_proxy": "", "NO_PROXY": "", "HOME": str(home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert "went on" in done.stdout
        assert "WandbSink failed and is no longer used" in done.stderr
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing wanted to go out
            proxy.accept()

    reader = accumulator(str(run / "tensorboard"))
    reader.Reload()
    found = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert found == [(step, 3 - step / 8) for step in range(1, 8)]

    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 3
    assert len({file.name for file in files}) == 1  # one run in their eyes
    assert [_wandb_losses(file) for file in files[:2]] == [
        {step: 3 - step / 8 for step in range(first, first + 3)} for first in (1, 3)
    ]
    assert not list(run.rglob("requirements.txt"))


def _wandb_losses(path: Path) -> dict[int, float]:
    """``train/loss`` by step in an offline file: LevelDB's log format behind 7 bytes, records in protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record = path.read_bytes(), 7, b""
    losses: dict[int, float] = {}
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            parsed = Record()
            parsed.ParseFromString(record)
            record = b""
            for item in parsed.history.item:
                if list(item.nested_key) == ["train/loss"]:
                    losses[parsed.history.step.num] = json.loads(item.value_json)
    return losses


def test_by_default_there_are_none(tmp_path: Path) -> None:
    open_sinks(PretrainingConfig(run="r"), tmp_path, 0).close()
    assert not list(tmp_path.iterdir())
