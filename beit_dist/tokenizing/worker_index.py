"""Which worker of how many: from the flags, or from the scheduler's environment."""

from __future__ import annotations

from collections.abc import Mapping

from beit_dist.config.environment import number
from beit_dist.errors import ConfigError

_ARRAY, _COMPLETION, _WORKERS = "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "BEIT_WORKERS"


def worker_index(index: int | None, count: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, count) of this worker.

    When not given, the index is the task's id in SLURM's job array or Kubernetes' completion index, and the count
    is ``BEIT_WORKERS``. Neither schedulers' variables nor flags: one worker alone. The id counts as it is,
    whatever else the array holds: a part of an array, submitted again, is the same workers.

    Raises:
        ConfigError: only one of both is known, or the index is not below the count.
    """
    count = worker_count(count, environment)
    name = "--index"
    if index is None:
        name = next((name for name in (_ARRAY, _COMPLETION) if environment.get(name)), name)
        index = None if name == "--index" else number(environment, name)
    if index is None and count in (None, 1):
        return 0, 1
    if index is None:
        raise ConfigError("--index", None, f"this worker's number, 0 to {count} - 1, as there are {count} workers")
    if count is None:
        raise ConfigError(
            "--count", None, f"the number of workers, as this is worker {index}", f"Or set {_WORKERS}."
        )
    if not 0 <= index < count:
        raise ConfigError(name, index, f"0 to {count - 1}, as there are {count} workers", _way_out(name, count))
    return index, count


def worker_count(count: int | None, environment: Mapping[str, str]) -> int | None:
    """The number of workers: ``count`` if it is given, else ``BEIT_WORKERS``; None if neither is.

    Raises:
        ConfigError: it is no number of workers.
    """
    if count is None:
        return number(environment, _WORKERS, low=1)
    if count < 1:
        raise ConfigError("--count", count, "1 or more")
    return count


def _way_out(name: str, count: int) -> str:
    if name == _ARRAY:
        return (
            f"The id of a task is its worker's number: sbatch --array=0-{count - 1}. If the array began at 1, "
            "worker 0 is still missing: --array=0. With other ids, give --index."
        )
    return f"--count or {_WORKERS} must be the number of workers, and the first of them is 0."
