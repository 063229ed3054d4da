"""A disk that fills up or cannot be written to, and files that rot: no step that was saved is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.engine.lines import Lines
from beit_dist.errors import ConfigError
from beit_dist.train import main

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"


@pytest.mark.slow
def test_a_full_disk_fails_saves_and_costs_no_more_than_the_steps_since_the_last_one(
    new_run: Callable[..., Any], small_disk: Path
) -> None:
    """Room for half a checkpoint at step 12, room again at step 15, and not a byte from step 16 on."""
    settings = ["loader.workers=0", "steps=30", "checkpoint.every_steps=3", "checkpoint.max_failed_saves=3"]
    whole = new_run("whole", overrides=settings)
    code, output = whole.finish()
    assert code == 0, output

    run = new_run("disk/run", overrides=settings)
    run.entry = small_disk.parent / "filling.py"
    run.entry.write_text(
        "import os, runpy, threading, time\n"
        "from prometheus_client import generate_latest\n"
        "from beit_dist.engine.record import Recorder\n"
        f"disk = {str(small_disk)!r}\n"
        "def leave(left):\n"
        "    space = os.statvfs(disk)\n"
        "    with open(disk + '/ballast', 'wb') as file:\n"
        "        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_bsize - left)\n"
        "def written(step):\n"
        "    while any(one.name == f'checkpoint-{step}' for one in threading.enumerate()): time.sleep(0.01)\n"
        "add = Recorder.add\n"
        "def filling(self, facts, *rest):\n"
        "    result = add(self, facts, *rest)\n"
        "    if facts.number == 10: written(9); leave(200_000)\n"
        "    if facts.number == 14:\n"
        "        written(12)\n"
        "        os.unlink(disk + '/ballast')\n"
        "    if facts.number == 16: written(15); leave(0)\n"
        "    if facts.number == 22: written(21)\n"
        "    if facts.number == 24: print(generate_latest(self._metrics.registry).decode())\n"
        "    return result\n"
        "Recorder.add = filling\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    code, output = run.finish()
    assert code == 1, output
    assert "checkpoint of step 12 was not saved: rank 0: [Errno 28] No space left on device" in output
    assert "3 checkpoints in a row could not be saved, the last at step 24:" in output
    assert "No space left on device. Check the disk, or raise checkpoint.max_failed_saves." in output
    assert "Traceback" not in output
    assert 'beit_checkpoint_saves_total{result="failed"} 3.0' in output  # steps 12, 18 and 21; 24 is to come
    assert 'beit_checkpoint_saves_total{result="ok"} 4.0' in output
    assert (run.folder / "FAILED").exists()
    assert not list(run.folder.glob("checkpoints/step-00000012.*"))

    (small_disk / "ballast").unlink()
    run.entry = TRAIN
    code, output = run.finish()
    assert code == 0, output
    assert "resumed from step-00000015.a0001" in output
    assert run.numbers() == whole.numbers()
    assert run.final_files() == whole.final_files()
    assert (run.folder / "DONE").exists()
    assert not (run.folder / "FAILED").exists()


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(small_disk: Path) -> None:
    lines = Lines(small_disk / "lines")
    space = os.statvfs(small_disk)
    with open(small_disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, space.f_bavail * space.f_bsize)
    written = [f"{number} {'x' * 500}" for number in range(100)]
    for line in written:
        lines.add(line)
        lines.flush()
    assert "lines cannot be written: No space left on device" in lines.fault
    (small_disk / "ballast").unlink()
    lines.flush(durable=True)
    assert lines.fault == ""
    lines.close()
    assert (small_disk / "lines").read_text().splitlines() == written


@pytest.mark.parametrize("part", ["run", "checkpoints", "checkpoints/attempts"])
def test_a_run_folder_that_cannot_be_written_to_is_refused_before_the_start(
    new_run: Callable[..., Any], small_disk: Path, part: str
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = new_run("disk/run" if part == "run" else "run")
    if part != "run":
        (run.folder / part).parent.mkdir(parents=True)
        (run.folder / part).symlink_to(small_disk)
    with pytest.raises(ConfigError, match=r"run: got '.*/run', expected a folder that can be written to") as said:
        main(run.command()[2:])
    assert "Read-only file system" in str(said.value)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = [
    (4, _flip, "rank-00001.safetensors"),
    (6, _cut, "rank-00000.safetensors"),
    (8, os.unlink, "rank-00001.safetensors"),
    (10, _flip, "rank-00001.json"),
    (12, _cut, "rank-00000.json"),
    (14, os.unlink, "rank-00001.json"),
    (16, _flip, "manifest.json"),
    (18, _cut, "manifest.json"),
]
"""Step, what happens to its checkpoint, and to which file of it."""


@pytest.mark.slow
def test_any_damage_to_any_file_sends_two_ranks_to_the_checkpoint_before(new_run: Callable[..., Any]) -> None:
    settings = ["loader.workers=0", "steps=20", "checkpoint.every_steps=2", "checkpoint.keep=20"]
    run = new_run("run", ranks=2, overrides=settings)
    code, output = run.finish()
    assert code == 0, output
    expected, files = run.numbers(), run.final_files()

    (run.folder / "checkpoints" / "step-00000020.a0001" / "manifest.json").unlink()  # then it does not exist
    for step, damage, name in DAMAGE:
        damage(run.folder / "checkpoints" / f"step-{step:08d}.a0001" / name)
    run.entry = run.folder.parent / "counting.py"
    run.entry.write_text(
        "import runpy\n"
        "from prometheus_client import generate_latest\n"
        "from beit_dist.engine.metrics import Metrics\n"
        "close = Metrics.close\n"
        "def counting(self):\n"
        "    print(generate_latest(self.registry).decode())\n"
        "    close(self)\n"
        "Metrics.close = counting\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    code, output = run.finish()
    assert code == 0, output
    assert "resumed from step-00000002.a0001" in output
    said = re.findall(r"checkpoint step-(\d+)\.a0001 is damaged \((\S+)", output)
    assert [int(step) for step, _ in said] == [step for step, _, _ in reversed(DAMAGE)]
    for (_, what), (_, _, name) in zip(said, reversed(DAMAGE), strict=True):
        assert what.rstrip(":") == ("its" if name == "manifest.json" else name)
    assert f"beit_checkpoint_damaged_total {float(len(DAMAGE))}" in output
    assert run.numbers() == expected
    assert run.final_files() == files
    assert len(list(run.folder.glob("checkpoints/*.bad"))) == len(DAMAGE)
    assert not (run.folder / "checkpoints" / "step-00000020.a0001").exists()
    assert json.loads((run.folder / "DONE").read_text())["step"] == 20
