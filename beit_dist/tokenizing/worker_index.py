"""Which worker of how many: from the flags, or from the scheduler's environment."""

from __future__ import annotations

from collections.abc import Mapping

from beit_dist.errors import ConfigError


def worker_index(index: int | None, count: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, count) of this worker.

    The index is that of SLURM's job array, (task id - min) / step, or Kubernetes' completion index, when not
    given; the count ``BEIT_WORKERS``. Neither schedulers' variables nor flags: one worker alone.

    Raises:
        ConfigError: only one of both is known, or the index is not below the count.
    """
    if index is None:
        index = _scheduled_index(environment)
    if count is None:
        count = _number(environment, "BEIT_WORKERS")
    if index is None and count in (None, 1):
        return 0, 1
    if index is None:
        raise ConfigError("--index", None, f"this worker's number, 0 to {count} - 1, as there are {count} workers")
    if count is None:
        raise ConfigError(
            "--count", None, f"the number of workers, as this is worker {index}", "Or set BEIT_WORKERS."
        )
    if count < 1:
        raise ConfigError("--count", count, "1 or more")
    if not 0 <= index < count:
        raise ConfigError(
            "--index", index, f"0 to {count - 1}", "The job array must have as many tasks as BEIT_WORKERS says."
        )
    return index, count


def _scheduled_index(environment: Mapping[str, str]) -> int | None:
    task = _number(environment, "SLURM_ARRAY_TASK_ID")
    if task is None:
        return _number(environment, "JOB_COMPLETION_INDEX")
    first = _number(environment, "SLURM_ARRAY_TASK_MIN") or 0
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") or 1
    if (task - first) % step:
        raise ConfigError("SLURM_ARRAY_TASK_ID", task, f"{first} plus a multiple of the array's step {step}")
    return (task - first) // step


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(name, text, "an integer") from None
