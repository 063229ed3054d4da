"""Each rank has a device of its own: by its number on the host, or because it was given one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.ports import free_ports

from beit_dist.engine.ranks.devices import claim, device_index, identity
from beit_dist.engine.ranks.distributed import Ranks, check_devices
from beit_dist.errors import PreflightError

ALL = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def test_ranks_that_see_all_devices_take_one_each() -> None:
    assert [device_index(rank, 4, ALL) for rank in range(4)] == [0, 1, 2, 3]
    assert [device_index(rank, 4, {}) for rank in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "environment",
    [
        {"CUDA_VISIBLE_DEVICES": "0"},  # srun --gpus-per-task=1 where cgroups number them anew
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "GPU-11111111-2222-3333-4444-555555555555"},
        {"ROCR_VISIBLE_DEVICES": "1"},
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"},
        {"SLURM_TRES_PER_TASK": "gres:gpu:1"},
    ],
)
def test_a_rank_that_was_given_its_own_device_takes_it(environment: dict[str, str]) -> None:
    assert [check_devices(Ranks(rank, 4, rank), 1, "cuda", environment) for rank in range(4)] == [0] * 4


def test_a_rank_with_several_devices_of_its_own_takes_one_of_them() -> None:
    assert [device_index(rank, 2, {"SLURM_GPUS_PER_TASK": "2"}) for rank in range(4)] == [0, 1, 0, 1]
    assert [device_index(rank, 2, {"SLURM_GPU_BIND": "closest"}) for rank in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("environment", [{}, ALL, {"CUDA_VISIBLE_DEVICES": ""}, {"SLURM_TRES_PER_TASK": "cpu=1"}])
def test_a_rank_without_a_device_is_named_before_it_joins(environment: dict[str, str]) -> None:
    assert check_devices(Ranks(9, 16, 1), 2, "cuda", environment) == 1
    with pytest.raises(PreflightError, match=r"rank 10 on .*: 2 cuda devices, expected .* at least 3\."):
        check_devices(Ranks(10, 16, 2), 2, "cuda", environment)
    with pytest.raises(PreflightError, match=r"rank 1 on .*: 1 cuda devices, expected .* at least 2\."):
        check_devices(Ranks(1, 2, 1), 1, "cuda", environment)


@pytest.mark.parametrize("environment", [{"SLURM_GPUS_PER_TASK": "1"}, {"CUDA_VISIBLE_DEVICES": "0"}, {}])
def test_no_device_is_nobodys(environment: dict[str, str]) -> None:
    with pytest.raises(PreflightError, match="0 cuda devices"):
        check_devices(Ranks(1, 2, 1), 0, "cuda", environment)


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["a", "b", "c"], None),
        (["", ""], None),
        (["a", "b", "a", "c"], "ranks 0 and 2 share one device (a)"),
    ],
    ids=["one each", "on the CPU", "two ranks with one"],
)
def test_all_ranks_refuse_a_device_that_two_of_them_have(names: list[str], shared: str | None) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=60))

    def said(rank: int) -> str | None:
        try:
            claim(store, rank, len(names), names[rank])
        except PreflightError as error:
            return str(error).partition(",")[0]
        return None

    with ThreadPoolExecutor(len(names)) as ranks:
        assert list(ranks.map(said, range(len(names)))) == [shared] * len(names)


def test_a_cpu_may_be_shared() -> None:
    assert identity(torch.device("cpu")) == ""


@pytest.mark.slow
def test_ranks_with_one_device_are_refused_before_they_talk_through_it() -> None:
    program = (
        "import sys\n"
        "from datetime import timedelta\n"
        "from beit_dist.engine.ranks import distributed\n"
        "distributed.identity = lambda device: 'GPU-1'\n"
        "distributed.dist.init_process_group = lambda *_, **__: sys.exit('they talked')\n"
        "rank = int(sys.argv[1])\n"
        "meeting = ('127.0.0.1', int(sys.argv[2]), None)\n"
        "distributed.init_process_groups(distributed.Ranks(rank, 2, rank), timedelta(seconds=60), meeting)\n"
    )
    (port,) = free_ports(1)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert "ranks 0 and 1 share one device (GPU-1)" in said
