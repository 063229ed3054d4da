"""Who this process is under any launcher: read from the environment that the launcher leaves, never guessed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from beit_dist.config.environment import number
from beit_dist.errors import ConfigError, UserError

if TYPE_CHECKING:
    import psutil

    from beit_dist.engine.ranks.distributed import Ranks

_LAUNCHERS = (
    "Start by --ranks, deepspeed, torchrun, srun, or the mpirun of Open MPI, MPICH, Intel MPI or MVAPICH2; or set "
    "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each rank."
)
_MOST_RANKS = 2**31 - 1
# slurm.h numbers what is no step from here on: the batch script, the shell of salloc, and others.
_NO_STEPS = 0xFFFFFFF0
_SPOKEN_FIRST = 3.0


class Names(NamedTuple):
    """The variables in which a launcher tells a process its place."""

    rank: str
    world: str
    local_rank: str
    host_ranks: str = ""
    """The number of ranks on this host, where the launcher says it."""


TORCH = Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""``deepspeed``, ``torchrun``, and users."""
SLURM = Names("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
MPI = (
    Names(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),  # Open MPI
    Names(*(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),  # MVAPICH2
    Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Hydra: MPICH, Intel MPI
    Names("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # HPE Cray's PALS
)
LISTENING = "BEIT_DIST_LISTENING"
"""Rank 0's, where ``--ranks`` has started the ranks: the descriptor of the open socket where they meet."""
_PMIX_RANK, _PMIX_JOB = "PMIX_RANK", "PMIX_NAMESPACE"
_STEP, _HOSTS_OF_STEP = "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES"
VARIABLES = sorted(
    {name for names in (TORCH, SLURM, *MPI) for name in names if name}
    | {_PMIX_RANK, _PMIX_JOB, _STEP, _HOSTS_OF_STEP}
)
"""All that are looked at."""


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Who this process is: by torch's variables, else by those of ``srun``, else by an MPI launcher's, else alone.

    An MPI launcher counts where it has started several. ``srun --mpi=pmix`` sets variables of both kinds; then
    SLURM's count. But ``mpirun`` in a job of SLURM, or in a shell of ``srun --pty``, leaves those of the step that
    started it or its daemons (see :func:`_runs_mpi`).

    Raises:
        ConfigError: the variables are incomplete or wrong; guessing would start many runs of one rank each.
    """
    from beit_dist.engine.ranks.distributed import Ranks  # and PyTorch: what starts ranks does without

    names = _names(environment)
    if names is None:
        if environment.get(_PMIX_RANK) and not environment.get(_PMIX_JOB, "").startswith("slurm."):
            expected = "a launcher that also says how many ranks there are"
            raise ConfigError(_PMIX_RANK, environment[_PMIX_RANK], expected, _LAUNCHERS)
        return Ranks()
    needed = names[:3]
    missing = [name for name in needed if not environment.get(name, "").strip()]
    if missing:
        raise ConfigError(", ".join(missing), None, f"{', '.join(needed)} all set, or none", _LAUNCHERS)
    world = number(environment, names.world, 1, _MOST_RANKS) or 1
    rank, local = (number(environment, name, 0, _MOST_RANKS) or 0 for name in (names.rank, names.local_rank))
    for name, place in ((names.rank, rank), (names.local_rank, local)):
        if place >= world:
            raise ConfigError(name, place, f"a rank below {names.world} ({world})")
    return Ranks(rank, world, local)


def number_started(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks a launcher has started; None where none has, or does not say it.

    Raises:
        ConfigError: its number is none.
    """
    names = _names(environment)
    return None if names is None else number(environment, names.world, 1, _MOST_RANKS)


def on_one_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher says that all ranks are on this host; False where it does not say."""
    names = _names(environment)
    if names is None or not names.host_ranks:
        return False
    return number(environment, names.host_ranks) == number(environment, names.world)


def speaks_for_its_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its host: it says what all there would say alike.

    So does one that cannot know, or whose own place is wrong.
    """
    names = _names(environment)
    local, rank, world = (names.local_rank, names.rank, names.world) if names else (_PMIX_RANK, "", "")
    places = [int(environment[name]) for name in (local, rank) if environment.get(name, "").isdecimal()]
    beyond = environment.get(world, "").isdecimal() and any(place >= int(environment[world]) for place in places)
    return beyond or not places or places[0] == 0


def as_one_rank(run: Callable[[Ranks], int]) -> int:
    """Run a command as one of the ranks; its exit code.

    What is wrong with the command or its input before the ranks join, one rank of each host says for all.
    """
    speaks = speaks_for_its_host() or not _has_siblings()
    try:
        return run(ranks_from_environment())
    except UserError as error:
        if speaks or error.exit_code != 2:  # what may be this rank's alone, such as a store that gives no answer
            raise
        time.sleep(_SPOKEN_FIRST)  # launchers end all ranks when the first has failed: it shall be said by then
        return error.exit_code


def _has_siblings() -> bool:
    """Whether what started this process has started others with the same command; then one of them speaks."""
    import psutil  # here: --help loads no dependency

    try:
        own = psutil.Process()
        parent = own.parent()
        others = [] if parent is None else [other for other in parent.children() if other != own]
        return any(_command(other) == _command(own) for other in others)
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> list[str]:
    return [word for word in process.cmdline() if not word.startswith("--local_rank")]  # deepspeed's numbers


def _names(environment: Mapping[str, str]) -> Names | None:
    """The variables that count; None where no launcher has started several processes."""
    if any(environment.get(name) for name in TORCH[:3]):
        return TORCH
    started = [names for names in MPI if _several(environment, names)]
    mpi = next((names for names in started if environment.get(names.local_rank)), next(iter(started), None))
    if not _in_a_step(environment):
        return mpi
    return mpi if mpi is not None and _runs_mpi(environment, mpi) else SLURM


def _several(environment: Mapping[str, str], names: Names) -> bool:
    """Whether an MPI launcher has started several processes, or does not say how many."""
    if not environment.get(names.rank):
        return False
    return environment.get(names.world, "").strip() != "1"


def _runs_mpi(environment: Mapping[str, str], mpi: Names) -> bool:
    """Whether the step of ``srun`` around this process is one task for each host, and MPI counts otherwise.

    Then the tasks are daemons that have started the ranks. Measured with SLURM 22.05 on two nodes: under ``mpirun
    -n 4`` of Open MPI 4.1 and of MPICH 4.0, two ranks each have the same ``SLURM_PROCID`` of ``SLURM_NTASKS=2``.
    """
    tasks, rank = (environment.get(name) for name in (SLURM.world, SLURM.rank))
    if tasks != environment.get(_HOSTS_OF_STEP, "1"):
        return False
    own = mpi in MPI[:2] and environment.get(mpi.rank) != rank  # srun never sets these
    return own or environment.get(mpi.world, "") not in ("", tasks)


def _in_a_step(environment: Mapping[str, str]) -> bool:
    """Whether ``srun`` has started this process; batch scripts and shells of ``salloc`` have its variables too."""
    text = environment.get(_STEP, "")
    return text.isdecimal() and int(text) < _NO_STEPS
