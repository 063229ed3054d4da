"""The held-out loss is the same number on any number of ranks, and training does not notice it."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.config import TrainConfig
from beit_dist.data.shards import Manifest, load_manifest
from beit_dist.engine.dataset import mask_generator, open_validation
from beit_dist.engine.distributed import Ranks
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.validation import Validation
from beit_dist.errors import ConfigError, DataError, SampleError
from beit_dist.models.mim import MaskedImageModel

MODEL = {
    "size": "tiny",
    "width": 32,
    "depth": 2,
    "heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vocabulary": 64,
    "drop_path": 0.5,
}


class Gathered:
    """Stands in for the ranks' agreement: one rank after the other, their sums added up by the test."""

    def __init__(self, rank: int, world: int, others: list[list[float]]) -> None:
        self.ranks = Ranks(rank, world)
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, list):
            self.others.append(value)
            return self.others
        return [value]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, make_shards: Callable[..., Manifest]) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    make_shards(folder, [20, 17], views=2, seed=3)
    return folder


def recipe(held_out: Path, samples: int = 30, mode: str = "exact") -> TrainConfig:
    return TrainConfig(
        run="r",
        model=MODEL,
        masking={"min_block": 4, "mode": mode},
        global_batch=16,
        validation={"data": str(held_out), "every_steps": 5, "samples": samples},
    )


def measure(config: TrainConfig, world: int, rows: int) -> tuple[float, float, int]:
    """What ``world`` ranks measure together."""
    model = MaskedImageModel(config.model)
    model.initialise(1)
    sums: list[list[float]] = []
    for rank in range(world):
        agreement: Any = Gathered(rank, world, sums)
        manifest = load_manifest(str(config.validation.data))
        made = Validation(config, manifest, mask_generator(config), rows, agreement, torch.device("cpu"))
        result = made.measure(model, StopRequest())
        made.close()
        assert result is not None
    return result.loss, result.accuracy, result.masked


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_ranks_and_micro_batch_do_not_change_the_result(held_out: Path, mode: str) -> None:
    config = recipe(held_out, mode=mode)
    loss, accuracy, masked = measure(config, 1, 30)
    assert loss == pytest.approx(math.log(64), rel=0.05)
    assert mode == "paper" or masked == 30 * mask_generator(config).positions_per_image
    for world, rows in ((1, 4), (2, 8), (3, 4), (4, 16)):
        assert measure(config, world, rows) == (pytest.approx(loss, rel=1e-6), accuracy, masked)


def test_repeated_it_is_the_same_to_the_last_bit(held_out: Path) -> None:
    assert measure(recipe(held_out), 2, 4) == measure(recipe(held_out), 2, 4)


def test_no_more_samples_than_there_are(held_out: Path) -> None:
    config = recipe(held_out, samples=1000)
    assert measure(config, 2, 4)[2] == 37 * mask_generator(config).positions_per_image


def test_a_stop_request_ends_it(held_out: Path) -> None:
    config, asked = recipe(held_out), StopRequest()
    agreement: Any = Gathered(0, 1, [])
    manifest = load_manifest(str(held_out))
    made = Validation(config, manifest, mask_generator(config), 4, agreement, torch.device("cpu"))
    seen = []

    def model(*batch: torch.Tensor) -> Any:
        seen.append(batch)
        asked.name = "SIGTERM"
        return MaskedImageModel(config.model)(*batch)

    assert made.measure(model, asked) is None
    assert len(seen) == 1


def test_it_is_due_at_the_interval_and_at_the_end(held_out: Path) -> None:
    config = recipe(held_out)
    agreement: Any = Gathered(0, 1, [])
    manifest = load_manifest(str(held_out))
    made = Validation(config, manifest, mask_generator(config), 4, agreement, torch.device("cpu"))
    assert [step for step in range(1, 13) if made.is_due(step, 12)] == [5, 10, 12]


def test_a_damaged_sample_is_named(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    make_shards(tmp_path, [20], seed=3)
    file = tmp_path / "v00" / "shard-000000.tar"
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)
    with pytest.raises(SampleError, match=r"shard-000000\.tar"):
        measure(recipe(tmp_path), 1, 4)


def test_a_set_that_does_not_fit_the_training_set_is_refused(
    held_out: Path, tmp_path: Path, make_shards: Callable[..., Manifest]
) -> None:
    training = make_shards(tmp_path / "training", [8])
    assert open_validation(recipe(held_out), training, check_files=True) == load_manifest(str(held_out))
    assert open_validation(TrainConfig(run="r"), training, check_files=True) is None
    make_shards(tmp_path / "other", [8], vocabulary=32)
    with pytest.raises(DataError, match=r"validation\.data: got .* with layout"):
        open_validation(recipe(tmp_path / "other"), training, check_files=True)
    with pytest.raises(ConfigError, match="it is the training set"):
        open_validation(recipe(tmp_path / "training"), training, check_files=True)
    (held_out_copy := tmp_path / "missing").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_validation(recipe(held_out_copy), training, check_files=True)


@pytest.mark.slow
def test_training_is_the_same_to_the_last_bit_with_and_without(
    new_run: Callable[..., Any], held_out: Path
) -> None:
    ds = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
    }
    runs = []
    for name, more in (
        ("without", []),
        ("with", [f"validation.data={held_out}", "validation.every_steps=3", "validation.samples=30"]),
    ):
        run = new_run(name, ds, ranks=2, overrides=["loader.workers=0", "steps=10", *more])
        code, output = run.finish()
        assert code == 0, output
        runs.append(run)
    without, validated = runs
    assert validated.numbers() == without.numbers()
    assert validated.final_files() == without.final_files()
    lines = results(validated.folder)
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    assert lines[0]["loss"] == pytest.approx(math.log(64), rel=0.05)
    assert {line["masked"] for line in lines} == {30 * 7}
    assert not (without.folder / "validation.jsonl").exists()


@pytest.mark.slow
def test_a_resumed_run_has_every_result_once(new_run: Callable[..., Any], held_out: Path) -> None:
    settings = [f"validation.data={held_out}", "validation.every_steps=3", "loader.workers=0", "steps=30"]
    run = new_run("run", overrides=settings)
    run.signal_at(10, signal.SIGKILL)
    code, output = run.finish()
    assert code == 0, output
    assert [line["step"] for line in results(run.folder)] == list(range(3, 31, 3))


def results(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
