"""--dry-run --measure takes some of the run's own steps, tells how long it takes, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.forked import Forked
from support.runs import ROOT, Run, wait
from support.tokenizers import picture

from beit_dist.engine.measuring import Timing
from beit_dist.errors import ConfigError
from beit_dist.train import main

DRIVER = """\
import sys

sys.path[:0] = {path}
from beit_dist.engine import measuring
from beit_dist.errors import exit_cleanly
from {module} import main

measuring._SECONDS, measuring._TIMING = {seconds}, 0.01
if __name__ == "__main__":
    exit_cleanly(main)
"""
"""A command with short timings, where a person would have some that can be trusted."""


def driver(file: Path, module: str, seconds: float = 0.1) -> Path:
    file.write_text(DRIVER.format(path=[str(ROOT)], module=module, seconds=seconds))
    return file


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where processes put their temporary files: a short path, as loaders have sockets there."""
    with tempfile.TemporaryDirectory(prefix="beit-test-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def quick(run: Run, seconds: float = 0.1) -> Run:
    """A run whose command times its steps for so long."""
    run.entry = driver(run.recipe.with_name("quick.py"), "beit_dist.commands.train", seconds)
    return run


def measurement_folders(temporary: Path) -> list[Path]:
    return list(temporary.glob("beit_dist-measure-*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_measurement_says_how_long_the_run_takes_by_its_median() -> None:
    timing = Timing((2.0, 1.0, 4.0), (1, 3, 2), 0.0312)
    whole = dict(timing.rows(batch=16, total=900, left=900))
    assert whole["measured"] == "2 s a step (1 to 4 in 3 timings of 6 steps), 8 images/s, data wait 3.1%"
    assert whole["duration"].startswith("about 30 min for all 900 steps, without checkpoints")
    assert (
        "about 30 min for all 900 steps; about 2.0 min for the 60 that are left,"
        in dict(timing.rows(batch=16, total=900, left=60))["duration"]
    )


def test_nothing_is_measured_where_a_run_is_started(new_run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"--measure: got True, expected --dry-run beside it\. Add --dry-run"):
        main([*new_run("run").command()[2:], "--measure"])


def test_without_a_measurement_the_dry_run_says_how_to_have_one(
    new_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*new_run("run").command()[2:], "--dry-run"]) == 0
    assert "duration    not known; add --measure to time" in capsys.readouterr().out


def test_two_ranks_measure_the_rest_of_a_run_and_leave_it_as_it_was(
    new_run: Callable[..., Any], temporary: Path
) -> None:
    run = new_run("run", overrides=["logging.tensorboard=true", "logging.metrics_port=0"])
    assert run.finish("steps=7")[0] == 0
    before, (saved,) = contents(run.folder), (run.folder / "checkpoints").glob("step-*")
    code, output = quick(run).finish("--dry-run", "--measure", "--ranks", "2")
    assert code == 0, output
    assert "batch       16 = 2 ranks " in output
    assert f"resumes     from step 7 of 46, {saved}\n" in output
    assert output.count("measured    ") == output.count("for all 46 steps; about ") == 1
    assert "for the 39 that are left" in output
    assert contents(run.folder) == before
    assert not measurement_folders(temporary)


def test_a_tokenizers_training_is_measured_alike(tmp_path: Path, temporary: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.fromarray(picture(number)).save(images / f"{number:02d}.png")
    entry = driver(tmp_path / "quick.py", "beit_dist.commands.tokenizer")
    settings = ["model.hidden=4", "model.vocabulary=16", "model.decoder_input=4", "view_size=16", "image_size=16"]
    settings += ["global_batch=4", "held_out=4", "steps=50", "precision=fp32", "workers=1"]
    words = [entry, "--images", images, "--out", tmp_path / "t.safetensors", *settings, "--dry-run", "--measure"]
    code, output = wait(Forked([*map(str, words)], os.environ, tmp_path))
    assert code == 0, output
    assert "epoch       2.0 steps of 4 images\n" in output
    assert "for all 50 steps," in output
    assert {path.name for path in tmp_path.iterdir()} == {"images", "quick.py"}
    assert not measurement_folders(temporary)


def test_a_stop_signal_ends_a_measurement_at_once_and_nothing_is_left(
    new_run: Callable[..., Any], temporary: Path
) -> None:
    run = quick(new_run("run"), seconds=600)
    process = run.start("--dry-run", "--measure")
    deadline = time.monotonic() + 120
    while not any((folder / "metrics.jsonl").exists() for folder in measurement_folders(temporary)):
        assert time.monotonic() < deadline, wait(process, 1)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, output = wait(process, 60)
    assert code == 130, output
    assert "stopped while measuring; nothing was kept" in output
    assert "Traceback" not in output
    assert not measurement_folders(temporary)
    assert not run.folder.exists()


def test_a_failure_while_measuring_is_told_as_in_a_start_and_nothing_is_left(
    new_run: Callable[..., Any], temporary: Path, tmp_path: Path, make_shards: Callable[..., Any]
) -> None:
    run = quick(new_run("run"))
    run.data = tmp_path / "damaged"
    make_shards(run.data, [64])
    shard = next(run.data.glob("v00/*.tar"))
    shard.write_bytes(bytes(shard.stat().st_size))
    code, output = run.finish("--dry-run", "--measure")
    assert code == 1, output
    assert "error: rank 0 on" in output
    assert "loader.bad_samples=N" in output
    assert not measurement_folders(temporary)
    assert not run.folder.exists()
