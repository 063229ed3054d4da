"""Which worker this is: flags first, then the scheduler, and never a guess."""

from __future__ import annotations

import pytest

from beit_dist.errors import ConfigError
from beit_dist.tokenizing.worker_index import worker_index


@pytest.mark.parametrize(
    ("index", "count", "environment", "place"),
    [
        (None, None, {}, (0, 1)),
        (None, 1, {}, (0, 1)),
        (2, 4, {}, (2, 4)),
        (None, 8, {"SLURM_ARRAY_TASK_ID": "0"}, (0, 8)),
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
        (None, None, {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID: got 'x'"),
        (None, 4, {"JOB_COMPLETION_INDEX": "-1"}, "JOB_COMPLETION_INDEX: got '-1'"),
        (None, 4, {"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX: got 4, expected 0 to 3"),
        (0, None, {"BEIT_WORKERS": "many"}, "BEIT_WORKERS: got 'many'"),
        (0, None, {"BEIT_WORKERS": "tcp://10.0.0.1:80"}, "BEIT_WORKERS: got 'tcp.*enableServiceLinks"),
        (0, None, {"BEIT_WORKERS": "0"}, "BEIT_WORKERS: got '0', expected a whole number, 1 or more"),
    ],
)
def test_a_place_that_is_not_clear_is_refused(
    index: int | None, count: int | None, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        worker_index(index, count, environment)


@pytest.mark.parametrize(
    ("first", "last", "step"),
    [("2", "2", "1"), ("0", "3", "1"), ("2", "3", "1"), ("0", "2", "2"), ("1", "3", "2")],
)
def test_a_part_of_an_array_submitted_again_is_the_same_workers(first: str, last: str, step: str) -> None:
    for task in range(int(first), int(last) + 1, int(step)):
        array = {
            f"SLURM_ARRAY_TASK_{name}": text for name, text in (("MIN", first), ("MAX", last), ("STEP", step))
        }
        array |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2", "BEIT_WORKERS": "4"}
        assert worker_index(None, None, array) == (task, 4)


def test_an_array_from_1_is_refused_at_its_end_with_the_worker_that_it_leaves_out() -> None:
    array = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "1", "BEIT_WORKERS": "4"}
    with pytest.raises(
        ConfigError, match=r"got 4, expected 0 to 3.*--array=0-3.*worker 0 is still missing: --array=0.*--index"
    ):
        worker_index(None, None, array)
    assert worker_index(3, None, array) == (3, 4)
