"""A rank knows who it is under every launcher, and never guesses."""

from __future__ import annotations

import pytest

from beit_dist.engine.distributed import Agreement, Ranks, check_devices, ranks_from_environment
from beit_dist.errors import ConfigError, PreflightError

TORCH = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}


def test_ranks_come_from_the_launcher_then_from_srun_then_alone() -> None:
    assert ranks_from_environment(TORCH) == Ranks(3, 8, 1)
    assert ranks_from_environment(SRUN) == Ranks(5, 6, 2)
    assert ranks_from_environment({**SRUN, **TORCH}) == Ranks(3, 8, 1)
    assert ranks_from_environment({}) == Ranks(0, 1, 0)


def test_a_batch_script_is_not_a_rank_of_its_job() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}
    assert ranks_from_environment(batch) == Ranks()


@pytest.mark.parametrize("missing", list(TORCH))
def test_incomplete_variables_are_refused(missing: str) -> None:
    environment = {name: value for name, value in TORCH.items() if name != missing}
    with pytest.raises(ConfigError, match=missing):
        ranks_from_environment(environment)


def test_srun_without_its_number_of_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match="SLURM_NTASKS"):
        ranks_from_environment({name: value for name, value in SRUN.items() if name != "SLURM_NTASKS"})


def test_a_rank_beyond_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK: got 8"):
        ranks_from_environment({**TORCH, "RANK": "8"})


def test_a_rank_without_a_device_is_named_before_it_joins() -> None:
    check_devices(Ranks(9, 16, 1), 2, "cuda")
    with pytest.raises(PreflightError, match=r"rank 10 on .*: 2 cuda devices, expected .* at least 3\."):
        check_devices(Ranks(10, 16, 2), 2, "cuda")


def test_alone_a_rank_agrees_with_itself() -> None:
    from datetime import timedelta

    agreement = Agreement(Ranks(), timedelta(seconds=1))
    agreement.post([3, True, False])
    assert agreement.result() == [3, 1, 0]
    assert agreement.gather("x") == ["x"]
    assert agreement.from_rank_0({"a": 1}) == {"a": 1}
