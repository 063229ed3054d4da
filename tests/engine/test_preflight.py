"""Before anything is allocated every rank's host is looked at; what is wrong is named once, with rank and host."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine import preflight
from beit_dist.engine.preflight import free_host_memory, memory_faults, raise_faults, trial
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Needs
from beit_dist.errors import PreflightError
from beit_dist.shards.manifest import load_manifest
from beit_dist.stream import shared_memory
from beit_dist.tasks.pretraining.dataset import build_plan
from beit_dist.tasks.pretraining.task import Pretraining

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"
CPU = torch.device("cpu")
GIB = 2**30


def test_all_that_is_wrong_is_one_error_that_no_retry_helps() -> None:
    raise_faults([("a", []), ("b", [])])
    with pytest.raises(PreflightError) as caught:
        raise_faults([("a", []), ("b", ["no memory", "no /dev/shm"]), ("c", ["wrong sum"])])
    assert "rank 1 on b: no memory; rank 1 on b: no /dev/shm; rank 2 on c: wrong sum" in str(caught.value)
    assert caught.value.exit_code == 2


def test_ranks_share_their_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_host_memory", lambda: 8 * GIB)
    monkeypatch.setattr(shared_memory, "room", lambda ranks: GIB // ranks)
    assert memory_faults(Needs(model=2 * GIB, shared=GIB // 4), CPU, neighbours=4) == []
    (fault,) = memory_faults(Needs(model=2 * GIB, shared=0), CPU, neighbours=5)
    assert "1.60 GiB free memory of the host for each of 5 ranks, expected at least 2.00 GiB" in fault
    (fault,) = memory_faults(Needs(model=GIB, copy=GIB, shared=0), CPU, neighbours=5)
    assert "at least 2.00 GiB for weights, gradients and optimizer, and the copy that a checkpoint" in fault
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 80 * GIB))
    gpu = torch.device("cuda", 1)
    assert memory_faults(Needs(model=GIB, copy=GIB, shared=0), gpu, neighbours=8) == []
    first, second = memory_faults(Needs(model=2 * GIB, copy=2 * GIB, shared=0), gpu, neighbours=8)
    assert "1.00 GiB free memory of cuda:1, expected at least 2.00 GiB for weights" in first
    assert (
        "1.00 GiB free memory of the host for each of 8 ranks, expected at least 2.00 GiB for the copy" in second
    )
    (fault,) = memory_faults(Needs(blocks=3 * GIB, blocks_setting="loader.memory_gib"), gpu, neighbours=5)
    assert "and 3.00 GiB of data fetched ahead" in fault
    assert "lower loader.memory_gib" in fault
    (fault,) = memory_faults(Needs(model=0, shared=GIB // 4), CPU, neighbours=5)
    assert "0.20 GiB of /dev/shm for each of 5 ranks, expected at least 0.25 GiB" in fault
    monkeypatch.setattr(shared_memory, "room", lambda ranks: None)
    assert memory_faults(Needs(model=0, shared=GIB), CPU, neighbours=1) == []


def test_blocks_that_are_fetched_ahead_from_a_url_count(small_data: Path, new_run: Callable[..., Any]) -> None:
    def blocks(*settings: str) -> int:
        config = load_recipe(PretrainingConfig, new_run("run").recipe, ["run=r", *settings])
        task = Pretraining(config)
        task.manifest = load_manifest(small_data)
        task.plan = build_plan(config, task.manifest)
        return task.needs(Resolved(2, 4, 2, 1, "bf16", "fp32", {})).blocks

    assert blocks(f"data={small_data}") == 0
    # 2 of 4 lanes, 2 blocks of 2 samples of 6,144 bytes each
    assert blocks("data=s3://shards/photos") == 2 * 2 * (2 * 6144)
    assert blocks("data=s3://shards/photos", "loader.memory_gib=0.00001") == 0


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_host_memory(tmp_path) == 500
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  5 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_memory(tmp_path, tmp_path) == 5 * 1024
    assert free_host_memory(tmp_path / "nothing", tmp_path) == 5 * 1024
    assert free_host_memory(tmp_path, tmp_path / "nothing") is None


def test_a_wrong_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = Agreement(Ranks(), timedelta(seconds=1))
    assert trial(agreement, CPU) == (0.0, None)
    agreement.ranks = Ranks(1, 3, 1)
    monkeypatch.setattr(dist, "all_reduce", lambda numbers: numbers.fill_(6.0))
    assert trial(agreement, CPU)[1] is None

    def broken(numbers: torch.Tensor) -> None:
        numbers.fill_(6.0)[7] = 5.0

    monkeypatch.setattr(dist, "all_reduce", broken)
    assert "a trial all-reduce gave 5, expected 6" in str(trial(agreement, CPU)[1])


@pytest.mark.slow
def test_a_rank_without_memory_stops_all_with_one_message(new_run: Callable[..., Any]) -> None:
    run = new_run("run", ranks=2, overrides=["loader.workers=0", "steps=7"])
    entry, run.entry = run.entry, run.folder.parent / "small.py"
    run.entry.write_text(
        "import os, runpy\n"
        "from beit_dist.engine import preflight\n"
        "if os.environ['RANK'] == '1':\n"
        "    preflight.free_host_memory = lambda: 1000\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    code, output = run.finish()
    assert code == 2, output
    assert output.count("error:") == 1
    assert output.count("0.00 GiB free memory of the host for each of 2 ranks") == 1
    assert "error: rank 1 on " in output
    assert not run.folder.exists()
    run.entry = entry
    code, output = run.finish()
    assert code == 0, output
    assert run.facts()["preflight"]["all_reduce_seconds"] > 0
