"""--preflight: each host says in one line what it lacks, and nothing is left on it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine import host
from beit_dist.engine.host import check_host, clock_difference
from beit_dist.errors import PreflightError


@pytest.fixture
def config(tmp_path: Path, make_shards: Callable[..., Any]) -> PretrainingConfig:
    """Of a run that can start here."""
    make_shards(tmp_path / "shards")
    return load_recipe(PretrainingConfig, None, [f"run={tmp_path / 'run'}", f"data={tmp_path / 'shards'}"])


def faults(config: PretrainingConfig, **environment: str) -> str:
    with pytest.raises(PreflightError) as found:
        check_host(config, "auto", environment)
    assert found.value.exit_code == 2
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_host_that_lacks_nothing_says_nothing_and_keeps_nothing(
    config: PretrainingConfig, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    check_host(config, "auto", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_all_that_is_wrong_is_in_one_line_with_the_hosts_name(config: PretrainingConfig, tmp_path: Path) -> None:
    broken = config.model_copy(update={"data": str(tmp_path / "none")})
    (tmp_path / "run").touch()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        meeting = {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": str(taken.getsockname()[1])}
        said = faults(broken, SLURMD_NODENAME="node17", **meeting)
        elsewhere = faults(broken, SLURMD_NODENAME="node18", SLURM_NODEID="1", **meeting)
    assert said.startswith("preflight: host node17: run: got ")
    assert f"data: {tmp_path / 'none' / 'manifest.json'} is not there, or cannot be read" in said
    assert "MASTER_ADDR: nowhere.invalid, where the ranks are to meet, cannot be looked up" in said
    assert "where the ranks are to meet, cannot be had (Address already in use)" in said
    assert "cannot be had" not in elsewhere, "the ranks meet at the first host"


def test_gpus_that_slurm_has_given_must_be_seen(
    config: PretrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    assert "PyTorch sees 7 of the 8 GPUs" in faults(config, SLURM_GPUS_ON_NODE="8")
    check_host(config, "auto", {"SLURM_GPUS_ON_NODE": "7"})
    check_host(config, "cpu", {"SLURM_GPUS_ON_NODE": "8"})
    check_host(config, "auto", {"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": "cpu"})


def test_a_clock_that_is_wrong_is_told(config: PretrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock_difference(Path(config.run).parent) == 0
    real = time.time
    monkeypatch.setattr(host.time, "time", lambda: real() + 60)
    assert clock_difference(Path(config.run).parent) == pytest.approx(60, abs=5)
    assert "its clock differs by +" in faults(config)


def test_little_room_and_missing_packages_are_told(
    config: PretrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_ROOM", 2**60)
    monkeypatch.setattr(host, "_PACKAGES", ("deepspeed", "not_installed_here"))
    said = faults(config)
    assert "MiB are free in" in said
    assert "Python has no not_installed_here" in said


def test_the_environment_is_not_printed(config: PretrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-of-tests")
    said = faults(config, **{**os.environ, "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "17171"})
    assert "hunter2-of-tests" not in said
