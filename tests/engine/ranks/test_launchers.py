"""A rank knows who it is under every launcher, and never guesses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from beit_dist.engine.ranks import launchers
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.ranks.launchers import as_one_rank, on_one_host, ranks_from_environment, speaks_for_its_host
from beit_dist.errors import ConfigError, StorageError, UserError

TRAIN = Path(__file__).parents[3] / "beit_dist" / "train.py"

TORCH = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
PMIX = {"PMIX_RANK": "2", "PMIX_NAMESPACE": "1297874945"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    **PMIX,
}
MVAPICH2 = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items() if name.startswith("OMPI")}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_FD": "6"}
PALS = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "2"}
MPI = {"Open MPI": OPEN_MPI, "MVAPICH2": MVAPICH2, "Hydra": HYDRA, "PALS": PALS}


def test_ranks_come_from_the_launcher_then_from_srun_then_alone() -> None:
    assert ranks_from_environment(TORCH) == Ranks(3, 8, 1)
    assert ranks_from_environment(SRUN) == Ranks(5, 6, 2)
    assert ranks_from_environment({**SRUN, **TORCH}) == Ranks(3, 8, 1)
    assert ranks_from_environment({}) == Ranks(0, 1, 0)


@pytest.mark.parametrize("launcher", MPI)
def test_ranks_of_an_mpi_launcher_know_their_place(launcher: str) -> None:
    assert ranks_from_environment(MPI[launcher]) == Ranks(2, 4, 0)


@pytest.mark.parametrize("launcher", MPI)
def test_torch_and_slurm_win_over_an_mpi_launcher(launcher: str) -> None:
    assert ranks_from_environment({**MPI[launcher], **TORCH}) == Ranks(3, 8, 1)
    assert ranks_from_environment({**MPI[launcher], **SRUN}) == Ranks(5, 6, 2)
    assert ranks_from_environment({**PMIX, **SRUN}) == Ranks(5, 6, 2)


@pytest.mark.parametrize("launcher", MPI)
def test_an_mpi_launcher_inside_a_step_of_one_process_counts(launcher: str) -> None:
    """``mpirun`` in the shell of ``srun --pty``, or on a host where it was started through ``srun``."""
    shell = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    assert ranks_from_environment({**shell, **MPI[launcher]}) == Ranks(2, 4, 0)
    assert ranks_from_environment({**shell, **PMIX}) == Ranks()


@pytest.mark.parametrize("launcher", MPI)
def test_an_mpi_launcher_whose_daemons_srun_has_started_counts(launcher: str) -> None:
    """As in a job of two nodes: one daemon on each, with two ranks."""
    daemon = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}
    assert ranks_from_environment({**daemon, **MPI[launcher]}) == Ranks(2, 4, 0)
    assert ranks_from_environment(daemon) == Ranks(1, 2, 0)


@pytest.mark.parametrize("launcher", MPI)
def test_one_process_of_an_mpi_launcher_is_alone(launcher: str) -> None:
    one = {name: "1" if name.endswith("SIZE") else "0" for name in MPI[launcher]}
    one.pop("PMIX_RANK", None)
    assert ranks_from_environment(one) == Ranks()
    without_local = {name: value for name, value in one.items() if name.endswith(("WORLD_RANK", "I_RANK", "SIZE"))}
    assert ranks_from_environment(without_local) == Ranks()


@pytest.mark.parametrize("launcher", MPI)
def test_an_mpi_launcher_that_does_not_say_all_is_refused_with_those_that_do(launcher: str) -> None:
    for name in [name for name in MPI[launcher] if name.endswith(("_SIZE", "LOCAL_RANK", "LOCALRANKID"))]:
        if "LOCAL_SIZE" in name:
            continue
        environment = {key: value for key, value in MPI[launcher].items() if key != name}
        with pytest.raises(ConfigError, match=r"got None.*deepspeed, torchrun, srun.*WORLD_SIZE"):
            ranks_from_environment(environment)


def test_ranks_of_mpirun_by_node_are_not_those_of_its_daemons() -> None:
    """``mpirun --map-by node`` with as many ranks as daemons: ``srun`` never sets Open MPI's variables."""
    daemons = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_LOCALID": "0"}
    assert ranks_from_environment({**daemons, **OPEN_MPI}) == Ranks(2, 4, 0)


def test_what_may_be_one_ranks_fault_alone_is_said_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launchers, "_has_siblings", lambda: True)
    monkeypatch.setattr(launchers, "_SPOKEN_FIRST", 0.0)

    def fail(error: UserError) -> Callable[[Ranks], int]:
        def run(ranks: Ranks) -> int:
            raise error

        return run

    assert as_one_rank(fail(ConfigError("data", "x", "a folder"))) == 2
    with pytest.raises(StorageError):
        as_one_rank(fail(StorageError("no answer")))


def test_a_launcher_that_says_a_rank_and_no_size_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"PMIX_RANK: got '2', .*deepspeed, torchrun, srun"):
        ranks_from_environment(PMIX)


def test_a_batch_script_is_not_a_rank_of_its_job() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}
    assert ranks_from_environment(batch) == Ranks()


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967292", str(0xFFFFFFF0), "batch"])
def test_a_shell_of_salloc_is_no_rank_of_its_job(step: str) -> None:
    shell = {**SRUN, "SLURM_STEP_ID": step}
    assert ranks_from_environment(shell) == Ranks()
    assert ranks_from_environment({**shell, "PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0"}) == Ranks()
    with pytest.raises(ConfigError, match="PMIX_RANK: got '2'"):
        ranks_from_environment({**shell, **PMIX})  # prun in a job
    assert ranks_from_environment({**shell, **OPEN_MPI}) == Ranks(2, 4, 0)
    assert ranks_from_environment({**shell, "SLURM_STEP_ID": str(0xFFFFFFF0 - 1)}) == Ranks(5, 6, 2)


@pytest.mark.parametrize("missing", list(TORCH))
def test_incomplete_variables_are_refused(missing: str) -> None:
    environment = {name: value for name, value in TORCH.items() if name != missing}
    with pytest.raises(ConfigError, match=missing):
        ranks_from_environment(environment)


def test_srun_without_its_number_of_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match="SLURM_NTASKS"):
        ranks_from_environment({name: value for name, value in SRUN.items() if name != "SLURM_NTASKS"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in TORCH for value in ("x", "-1", "1.5", "1_0", "9" * 30, "tcp://10.0.0.1:80")),
        ("RANK", "8"),
        ("LOCAL_RANK", "8"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "2"),
        ("WORLD_SIZE", str(2**31)),
    ],
)
def test_a_variable_that_is_no_place_among_the_ranks_is_refused(name: str, value: str) -> None:
    named = "RANK" if (name, value) == ("WORLD_SIZE", "2") else name
    with pytest.raises(ConfigError, match=rf"^{named}: got"):
        ranks_from_environment({**TORCH, name: value})


@pytest.mark.parametrize("environment", [SRUN, OPEN_MPI, HYDRA])
def test_so_is_one_of_any_other_launcher(environment: dict[str, str]) -> None:
    name = next(name for name in environment if name.endswith(("PROCID", "_RANK")))
    with pytest.raises(ConfigError, match=rf"^{name}: got 'x'"):
        ranks_from_environment({**environment, name: "x"})


def test_mpi_launchers_say_whether_all_ranks_are_on_one_host() -> None:
    for environment in MPI.values():
        assert not on_one_host(environment)
        assert on_one_host(
            {name: "4" if name.endswith(("SIZE", "NRANKS")) else v for name, v in environment.items()}
        )
    assert not on_one_host(SRUN)
    assert not on_one_host({})


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({**TORCH, "LOCAL_RANK": "0"}, True),
        (TORCH, False),
        ({**TORCH, "LOCAL_RANK": "x"}, False),
        ({**TORCH, "RANK": "0", "LOCAL_RANK": "x"}, True),
        ({**TORCH, "RANK": "x", "LOCAL_RANK": "x"}, True),
        ({**TORCH, "WORLD_SIZE": "x"}, False),
        ({**TORCH, "RANK": "9"}, True),  # its own fault: no other rank would say it
        ({**SRUN, "SLURM_LOCALID": "0"}, True),
        (SRUN, False),
        (OPEN_MPI, True),
        (PMIX, False),
        ({**PMIX, "PMIX_RANK": "0"}, True),
    ],
)
def test_one_rank_of_a_host_speaks_for_all(environment: dict[str, str], speaks: bool) -> None:
    assert speaks_for_its_host(environment) is speaks


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_wrong_for_all_is_said_once_and_by_a_rank_that_is_there(count: int) -> None:
    """Two ranks, or rank 1 alone, whose host has no rank 0 to say it."""
    start = "import os, subprocess, sys\nranks = [subprocess.Popen(sys.argv[2:], env=os.environ | {'RANK': r, "
    start += "'LOCAL_RANK': r}) for r in sys.argv[1]]\nprint(sorted(rank.wait() for rank in ranks))"
    ranks = ["1"] if count == 1 else ["01"]
    command = [sys.executable, "-c", start, *ranks, sys.executable, str(TRAIN), "--ds_config", "x.json"]
    environment = {"PATH": "/usr/bin:/bin", "WORLD_SIZE": "many", "PYTHONPATH": str(TRAIN.parents[1])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == str([2] * count)
    assert ended.stderr.count("error: WORLD_SIZE: got 'many', expected a whole number") == 1
    assert len(ended.stderr.splitlines()) == 1
