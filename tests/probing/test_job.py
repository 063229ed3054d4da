"""A probe is the same on any number of ranks, and what was finished is not made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.together import together

from beit_dist.config.labelled import LabelledLoaderConfig
from beit_dist.errors import ConfigError, DataError, SpaceError
from beit_dist.images.labelled.images import find_labelled
from beit_dist.models.mim import MaskedImageModel
from beit_dist.probing import job as jobs
from beit_dist.probing import room
from beit_dist.probing.job import Job, result_of
from beit_dist.probing.origin import Origin
from beit_dist.probing.pictures import Pictures, pictures_of
from beit_dist.probing.scores import LayerScores
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place


@pytest.fixture
def pictures(training: Path, test: Path) -> Pictures:
    known = find_labelled(str(training), Access())
    others = find_labelled(str(test), Access(), classes=known.classes)
    return pictures_of(known, others, None, "--data")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PART_BATCHES", 2)


def a_job(model: MaskedImageModel, pictures: Pictures, out: Path) -> Job:
    origin = Origin("a model", model.config, dict(model.state_dict()), "digest")
    return Job(origin, pictures, (1, 3), open_place(out), 4, LabelledLoaderConfig(), Access())


def run(job: Job, world: int) -> tuple[list[LayerScores], int]:
    """What all ranks find, and how many images were looked at."""
    seen: list[int] = []
    found = together(world, lambda ranks: job.run(ranks, torch.device("cpu"), seen.append))
    assert all(scores == found[0] for scores in found)
    return found[0], sum(seen)


def test_ranks_change_nothing_to_the_last_bit(model: MaskedImageModel, pictures: Pictures, tmp_path: Path) -> None:
    alone, looked_at = run(a_job(model, pictures, tmp_path / "1"), 1)
    assert looked_at == 45
    assert [scores.layer for scores in alone] == [1, 3]
    for world in (2, 3):
        assert run(a_job(model, pictures, tmp_path / str(world)), world) == (alone, 45)
    parts = [sorted(path.read_bytes() for path in (tmp_path / name).rglob("*.f32")) for name in "123"]
    assert parts[0] == parts[1] == parts[2]


def test_a_probe_that_was_killed_keeps_the_parts_that_were_finished(
    model: MaskedImageModel, pictures: Pictures, tmp_path: Path
) -> None:
    job = a_job(model, pictures, tmp_path)
    whole = run(job, 1)[0]
    parts = job.parts
    for part in (1, 5):  # the last one has 5 images
        (parts.place.path / f"part-{part:06d}.f32").unlink()
    assert run(job, 2) == (whole, 13)
    assert run(job, 1) == (whole, 0)


def test_colours_are_told_apart_by_the_features_of_any_layer(
    model: MaskedImageModel, pictures: Pictures, tmp_path: Path
) -> None:
    job = a_job(model, pictures, tmp_path)
    result = result_of(job, run(job, 1)[0])
    assert result["linear"]["accuracy"] == result["knn"]["accuracy"] == 1.0
    assert result["commonest_class"] == pytest.approx(4 / 9)
    assert result["images"] == {"fit": 29, "choice": 7, "test": 9}


def test_ranks_that_see_other_weights_or_images_are_refused(
    model: MaskedImageModel, pictures: Pictures, tmp_path: Path
) -> None:
    def run_one(ranks: Any) -> None:
        job = a_job(model, pictures, tmp_path)
        other = replace(job, origin=replace(job.origin, digest=f"rank {ranks.ranks.rank}"))
        other.run(ranks, torch.device("cpu"), lambda images: None)

    with pytest.raises(DataError, match="the ranks see different images or weights"):
        together(2, run_one)


def test_a_disk_without_room_is_refused(
    model: MaskedImageModel, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 11_519}))
    with pytest.raises(SpaceError, match=r"--out: .* has 11.2 KiB free, expected 11.2 KiB"):
        a_job(model, pictures, tmp_path / "not" / "there").check_space()


def test_few_samples_are_a_random_part_of_the_training_images(training: Path, test: Path) -> None:
    known = find_labelled(str(training), Access())
    some = pictures_of(known, None, 20, "--data")
    assert len(some.images) == 20
    assert len({file.entry.text.split("/")[-2] for file in some.images.files}) == 3


def test_images_in_both_and_classes_that_only_the_test_images_have_are_refused(
    training: Path, tmp_path: Path
) -> None:
    known = find_labelled(str(training), Access())
    with pytest.raises(
        ConfigError, match=r"--test: got .*amber/000\.png.* expected images that are not in --data"
    ):
        pictures_of(known, known, None, "--data")
    (tmp_path / "red").mkdir()
    (tmp_path / "red/1.png").write_bytes((training / "amber/000.png").read_bytes())
    with pytest.raises(DataError, match="red"):
        find_labelled(str(tmp_path), Access(), classes=known.classes)
