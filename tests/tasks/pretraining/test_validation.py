"""The held-out loss is the same number on any number of ranks, and training does not notice it."""

from __future__ import annotations

import json
import math
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.classes import write_classes

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.ranks.preemption import StopRequest
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Surroundings
from beit_dist.errors import AccessError, ConfigError, DataError, SampleError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.shards.manifest import Manifest, load_manifest
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.tasks.pretraining.dataset import HeldOut, open_validation
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.tasks.pretraining.validation import Validation
from beit_dist.train import main

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


def recipe(held_out: Path, samples: int = 30, mode: str = "exact") -> PretrainingConfig:
    return PretrainingConfig(
        run="r",
        model=MODEL,
        masking={"min_block": 4, "mode": mode},
        global_batch=16,
        validation={"data": str(held_out), "every_steps": 5, "samples": samples},
    )


def validation(
    config: PretrainingConfig, agreement: Any, rows: int, stop: StopRequest | None = None
) -> Validation:
    """What one of the agreement's ranks measures with, ``rows`` samples at once."""
    resolved = Resolved(agreement.ranks.world, rows, 1, 0, "fp32", "fp32", {})
    around = Surroundings(agreement, torch.device("cpu"), resolved, stop or StopRequest(), lambda: None)
    data = str(config.validation.data)
    task = Pretraining(config)
    return Validation(config, HeldOut(data, load_manifest(data)), task.masks, task.measured, around)


def measure(config: PretrainingConfig, world: int, rows: int) -> tuple[float, float, int]:
    """What ``world`` ranks measure together."""
    model = MaskedImageModel(config.model)
    model.initialise(1)
    sums: list[list[float]] = []
    for rank in range(world):
        made = validation(config, Gathered(rank, world, sums), rows)
        result = made.measure(model)
        made.close()
        assert result is not None
    return result["loss"], result["accuracy"], result["masked"]


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_ranks_and_micro_batch_do_not_change_the_result(held_out: Path, mode: str) -> None:
    config = recipe(held_out, mode=mode)
    loss, accuracy, masked = measure(config, 1, 30)
    assert loss == pytest.approx(math.log(64), rel=0.05)
    assert mode == "paper" or masked == 30 * Pretraining(config).masks.positions_per_image
    for world, rows in ((1, 4), (2, 8), (3, 4), (4, 16)):
        assert measure(config, world, rows) == (pytest.approx(loss, rel=1e-6), accuracy, masked)


def test_repeated_it_is_the_same_to_the_last_bit(held_out: Path) -> None:
    assert measure(recipe(held_out), 2, 4) == measure(recipe(held_out), 2, 4)


def test_no_more_samples_than_there_are(held_out: Path) -> None:
    config = recipe(held_out, samples=1000)
    assert measure(config, 2, 4)[2] == 37 * Pretraining(config).masks.positions_per_image


def test_a_stop_request_ends_it(held_out: Path) -> None:
    config, asked = recipe(held_out), StopRequest()
    made = validation(config, Gathered(0, 1, []), 4, asked)
    seen = []

    def model(*batch: torch.Tensor) -> Any:
        seen.append(batch)
        asked.name = "SIGTERM"
        return MaskedImageModel(config.model)(*batch)

    assert made.measure(model) is None
    assert len(seen) == 1


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
    opened = open_validation(recipe(held_out), training, check_files=True)
    assert opened == HeldOut(str(held_out), load_manifest(str(held_out)))
    assert open_validation(PretrainingConfig(run="r"), training, check_files=True) is None
    make_shards(tmp_path / "other", [8], vocabulary=32)
    with pytest.raises(DataError, match=r"validation\.data: got .* with layout"):
        open_validation(recipe(tmp_path / "other"), training, check_files=True)
    with pytest.raises(ConfigError, match="it is the training set"):
        open_validation(recipe(tmp_path / "training"), training, check_files=True)
    (held_out_copy := tmp_path / "missing").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_validation(recipe(held_out_copy), training, check_files=True)


@pytest.fixture
def split(tmp_path: Path, make_shards: Callable[..., Manifest]) -> Path:
    """A data set that holds 5 images out."""
    make_shards(tmp_path / "data", [20], views=2)
    make_shards(tmp_path / "data/held-out", [5], first=20)
    return tmp_path / "data"


def test_what_the_data_set_holds_out_is_measured_unless_something_else_is_said(
    split: Path, held_out: Path
) -> None:
    manifest, own = load_manifest(str(split)), load_manifest(str(split / "held-out"))
    base = {"run": "r", "data": f"{split}/"}
    opened = open_validation(PretrainingConfig(**base), manifest, check_files=True)
    assert opened == HeldOut(f"{split}/held-out", own)
    other = PretrainingConfig(**base, validation={"data": str(held_out)})
    assert open_validation(other, manifest, check_files=True) == HeldOut(
        str(held_out), load_manifest(str(held_out))
    )
    none = PretrainingConfig(**base, validation={"data": None})
    assert open_validation(none, manifest, check_files=True) is None
    (split / "held-out/v00/shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"held-out: 1 of 1 shards are missing"):
        open_validation(PretrainingConfig(**base), manifest, check_files=True)
    (split / "held-out/manifest.json").unlink()
    assert open_validation(PretrainingConfig(**base), manifest, check_files=True) is None


def test_held_out_images_at_a_url_are_found(split: Path) -> None:
    url = f"memory://{uuid.uuid4()}/data"
    for path in split.rglob("*.*"):
        open_place(url).write(path.relative_to(split).as_posix(), path.read_bytes())
    opened = open_validation(PretrainingConfig(run="r", data=url), load_manifest(url), check_files=True)
    assert opened == HeldOut(f"{url}/held-out", load_manifest(split / "held-out"))


def test_a_store_that_refuses_the_missing_folder_measures_nothing(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LocalPlace, name: str) -> bool:
        raise AccessError("403")  # S3, of missing files, to those who may not list

    monkeypatch.setattr(LocalPlace, "exists", refuse)
    config = PretrainingConfig(run="r", data=str(split))
    assert open_validation(config, load_manifest(str(split)), check_files=True) is None


def test_ranks_that_see_different_held_out_images_are_refused(split: Path) -> None:
    class OneWithout(Gathered):
        def gather(self, value: Any) -> list[Any]:
            return [value, None]

    task = Pretraining(PretrainingConfig(run="r", data=str(split), model=MODEL, masking={"min_block": 4}))
    task.check(Ranks())
    resolved = Resolved(2, 4, 1, 0, "fp32", "fp32", {})
    around = Surroundings(OneWithout(0, 2, []), torch.device("cpu"), resolved, StopRequest(), lambda: None)
    digest = load_manifest(split / "held-out").digest[:12]
    with pytest.raises(DataError, match=rf"different held-out images \(rank 0 {digest}, rank 1 none\)\. Copy"):
        task.prepare(around, None)


def test_short_runs_are_measured_ten_times_and_long_ones_every_thousand_steps() -> None:
    config = PretrainingConfig(run="r")
    assert [config.measured_every(steps) for steps in (3, 10, 95, 10_000, 10**6)] == [1, 1, 9, 1000, 1000]
    assert PretrainingConfig(run="r", validation={"every_steps": 7}).measured_every(95) == 7


def test_the_dry_run_says_what_is_measured(
    split: Path, new_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    command = new_run("run", overrides=[f"data={split}", "steps=50"]).command()[2:]

    def row(*overrides: str) -> str:
        assert main([*command, *overrides, "--dry-run"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("held out"))

    assert row().endswith(f"  {split}/held-out: 5 images, measured every 5 steps")
    assert row("validation.samples=3", "validation.every_steps=20").endswith(": 3 images, measured every 20 steps")
    assert row("validation.data=null").endswith("is not measured (validation.data=null)")
    (split / "held-out/manifest.json").unlink()
    assert row().endswith("is not measured (beit shards --held-out 2% keeps some aside)")


@pytest.mark.slow
def test_training_is_the_same_to_the_last_bit_with_and_without(
    new_run: Callable[..., Any], held_out: Path, tmp_path: Path
) -> None:
    labelled = write_classes(tmp_path / "labelled")
    ds = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
    }
    runs = []
    for name, more in (
        ("without", []),
        (
            "with",
            [
                *(f"validation.data={held_out}", "validation.every_steps=3", "validation.samples=30"),
                *(f"validation.probe.data={labelled}", "validation.probe.every_steps=5"),
            ],
        ),
    ):
        run = new_run(name, ds, ranks=2, overrides=["loader.workers=0", "steps=10", *more])
        code, output = run.finish()
        assert code == 0, output
        runs.append(run)
    without, validated = runs
    assert validated.numbers() == without.numbers()
    assert validated.final_files() == without.final_files()
    lines = results(validated.folder)
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in lines if line.get("probe_linear", 0) > 0.8] == [5, 10]
    assert lines[0]["loss"] == pytest.approx(math.log(64), rel=0.05)
    assert {line["masked"] for line in lines if "loss" in line} == {30 * 7}
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
