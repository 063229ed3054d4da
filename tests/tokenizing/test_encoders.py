"""Several encoding processes by one command: the bytes of one, a fair share of decoders, and one end for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.processes import left_of, members

from beit_dist.commands import shards
from beit_dist.config.dvae import DVAEConfig
from beit_dist.errors import ConfigError, DataError, SampleError
from beit_dist.models.dvae import DVAE
from beit_dist.tokenizing import encoders
from beit_dist.tokenizing.encoders import decoders_of_encoder
from beit_dist.weights.tokenizer_files import save_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--image-size", "32", "--patch-size", "8", "--shard-samples", "2", "--batch", "2", "--device", "cpu"]


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "images").mkdir()
    for number in range(11):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    config = DVAEConfig(vocabulary=32, hidden=4, blocks_per_group=1, decoder_input=4)
    save_tokenizer(tmp_path / "dvae.safetensors", DVAE(config), config, {})
    sources = ["--images", str(tmp_path / "images"), "--tokenizer", str(tmp_path / "dvae.safetensors")]
    return [*sources, "--decoders", "0", *SMALL]


def files(out: Path) -> dict[str, bytes]:
    names = [*out.rglob("v*/*.tar"), *out.rglob("manifest.json"), *out.rglob("rejected.jsonl")]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}


def run(options: list[str], out: Path, *more: str) -> int:
    return int(shards.main([*options, "--out", str(out), *more]))


@pytest.mark.slow
def test_two_encoders_write_what_one_writes(options: list[str], tmp_path: Path) -> None:
    held_out = ["--held-out", "3"]
    assert run(options, tmp_path / "one", *held_out) == 0
    assert run(options, tmp_path / "two", "--encoders", "2", *held_out, "--decoders", "2") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "two")) == 4 + 2 + 2 + 2


@pytest.mark.slow
def test_encoders_of_two_hosts_share_the_shards_and_a_host_keeps_its_own(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(options, tmp_path / "one") == 0
    run(options, out, "--index-only")
    capsys.readouterr()
    assert run(options, out, "--index", "1", "--count", "2", "--encoders", "2") == 0
    assert "worker 1 of 2: 3 shards made, 0 kept, 5 images" in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("commits/*")) == [f"shard-{n:06d}.json" for n in (1, 3, 5)]
    with pytest.raises(DataError, match="Of 2 workers, these make them: 0"):
        shards.main(["--out", str(out), "--finish", "--count", "2"])
    assert run(options, out, "--index", "0", "--count", "2") == 0
    assert shards.main(["--out", str(out), "--finish"]) == 0
    assert files(out) == files(tmp_path / "one")


@pytest.mark.slow
def test_killed_encoders_leave_no_process_and_what_they_finished_is_kept(
    options: list[str], tmp_path: Path
) -> None:
    out, tool = tmp_path / "out", [sys.executable, str(REPOSITORY / "tools" / "shard_tokens.py")]
    assert run(options, tmp_path / "one") == 0
    command = [*tool, *options, "--out", str(out), "--encoders", "2", "--decoders", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("commits/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("commits/*.json")}
    assert kept
    assert not left_of(members(process.pid), seconds=120), "encoding processes outlived their parent"
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert files(out) == files(tmp_path / "one")
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())


@pytest.mark.slow
def test_what_one_encoder_refuses_ends_all_with_its_message(options: list[str], tmp_path: Path) -> None:
    run(options, tmp_path / "out", "--index-only")
    (tmp_path / "images/4.png").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"4\.png"):
        run(options, tmp_path / "out", "--encoders", "2")


def _dies(connection: Any, options: Any) -> None:
    os._exit(9)


def test_an_encoder_that_dies_is_told_with_the_way_out(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "_serve", _dies)
    with pytest.raises(SampleError, match=r"an encoding process died.*finished shards are kept"):
        run(options, tmp_path / "out", "--encoders", "2")


@pytest.mark.parametrize(
    ("wanted", "shares"), [(0, [0, 0, 0]), (1, [1, 1, 1]), (5, [2, 2, 1]), (6, [2, 2, 2]), (None, [6, 6, 5])]
)
def test_decoders_are_shared_fairly(
    wanted: int | None, shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders.os, "sched_getaffinity", lambda _: set(range(17)))
    assert [decoders_of_encoder(wanted, 3, number) for number in range(3)] == shares


def test_at_most_16_decoders_for_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders.os, "sched_getaffinity", lambda _: set(range(200)))
    assert [decoders_of_encoder(None, 2, number) for number in range(2)] == [16, 16]


def test_no_encoders_are_refused(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--encoders: got 0, expected 1 or more"):
        run(options, tmp_path / "out", "--encoders", "0")
    assert not (tmp_path / "out").exists()
