"""Which worker this is: flags first, then the scheduler, and never a guess."""

from __future__ import annotations

import pytest

from beit_dist.errors import ConfigError
from beit_dist.tokenizing.worker_index import worker_index

ARRAY = {"SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "5"}


@pytest.mark.parametrize(
    ("index", "count", "environment", "place"),
    [
        (None, None, {}, (0, 1)),
        (None, 1, {}, (0, 1)),
        (2, 4, {}, (2, 4)),
        (None, None, {"SLURM_ARRAY_TASK_ID": "20", "BEIT_WORKERS": "4", **ARRAY}, (2, 4)),
        (None, 8, {"SLURM_ARRAY_TASK_ID": "10", **ARRAY}, (0, 8)),
        (None, None, {"SLURM_ARRAY_TASK_ID": "3", "BEIT_WORKERS": "4"}, (3, 4)),
        (None, None, {"JOB_COMPLETION_INDEX": "1", "BEIT_WORKERS": "2"}, (1, 2)),
        (0, 2, {"JOB_COMPLETION_INDEX": "1", "BEIT_WORKERS": "9"}, (0, 2)),
        (None, None, {"BEIT_WORKERS": "1"}, (0, 1)),
    ],
)
def test_the_place_follows_from_flags_or_scheduler(
    index: int | None, count: int | None, environment: dict[str, str], place: tuple[int, int]
) -> None:
    assert worker_index(index, count, environment) == place


@pytest.mark.parametrize(
    ("index", "count", "environment", "message"),
    [
        (None, 4, {}, "--index: got None"),
        (None, None, {"BEIT_WORKERS": "4"}, "--index: got None"),
        (1, None, {}, "BEIT_WORKERS"),
        (None, None, {"JOB_COMPLETION_INDEX": "0"}, "--count: got None"),
        (4, 4, {}, "--index: got 4, expected 0 to 3"),
        (-1, 4, {}, "--index: got -1"),
        (0, 0, {}, "--count: got 0"),
        (
            None,
            None,
            {"SLURM_ARRAY_TASK_ID": "12", "BEIT_WORKERS": "4", **ARRAY},
            "multiple of the array's step 5",
        ),
        (None, None, {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID: got 'x'"),
        (0, None, {"BEIT_WORKERS": "many"}, "BEIT_WORKERS: got 'many'"),
    ],
)
def test_a_place_that_is_not_clear_is_refused(
    index: int | None, count: int | None, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        worker_index(index, count, environment)
