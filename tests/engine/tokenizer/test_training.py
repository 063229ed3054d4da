"""Training a tokenizer is reproducible, learns, goes on exactly where it stopped, and says when it fails."""

from __future__ import annotations

import json
import shutil
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tokenizers import StopAfter

from beit_dist.data import crops
from beit_dist.data.image_files import ImageFile, find_images
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.engine.tokenizer import training as loop
from beit_dist.engine.tokenizer.training import Progress, TokenizerTrainer
from beit_dist.errors import CheckpointError, DataError, TrainingError
from beit_dist.storage.opening import open_place
from beit_dist.visual_tokens.weights import load_tokenizer, tokenizer_extra

Make = Callable[..., Any]
STAGES = {
    "built in": None,
    "stage 1, bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "stage 3, fp32": {"zero_optimization": {"stage": 3}},
}


def test_same_seed_gives_the_same_file_and_another_seed_another(training: Make) -> None:
    first, second, other = training("a"), training("b", workers=1), training("c", seed=1)
    assert [each.start() for each in (first, second, other)] == ["DONE"] * 3
    one, two, three = (load_tokenizer(each.out).digest for each in (first, second, other))
    assert one == two
    assert three != one
    assert first.lines() == second.lines()


def test_file_and_picture_are_written_and_record_how_they_were_made(
    training: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = training("t")
    assert trained.start() == "DONE"
    model, about = load_tokenizer(trained.out), tokenizer_extra(trained.out)
    assert model.config.vocabulary == 16
    assert about["recipe"]["steps"] == 6
    assert "run" not in about["recipe"]
    assert about["images"] == 12
    assert 1 <= about["quality"]["used"] <= 16
    assert Image.open(trained.out.with_suffix(".png")).size == (3 * 32, 2 * 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "t.png", "t.run", "t.safetensors"]
    assert trained.start(kl_weight=0.2) == "DONE"  # says that it is done already, and with what
    assert "kl_weight was 0.1, now 0.2\nalready done" in capsys.readouterr().out
    assert not (trained.run / "checkpoints" / "attempts" / "000002").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_and_resumed_training_equals_one_that_never_stopped(training: Make, stage: str) -> None:
    settings: dict[str, Any] = {"steps": 9, "measure_every_steps": 4, "micro_batch": 2}
    whole, cut = training("whole", **settings), training("cut", **settings)
    assert whole.start(ds=STAGES[stage]) == "DONE"
    assert cut.start(StopAfter(5), STAGES[stage]) == "PREEMPTED"
    assert cut.state()[0] == 5
    assert (cut.run / "PREEMPTED").exists()
    assert not cut.out.exists()
    assert cut.start(ds=STAGES[stage]) == "DONE"
    assert not (cut.run / "PREEMPTED").exists()
    assert cut.lines() == whole.lines()
    assert [line["step"] for line in whole.lines()] == list(range(1, 10))
    assert cut.lines("validation.jsonl") == whole.lines("validation.jsonl")
    assert cut.state() == whole.state()
    assert set(cut.state()[1]) == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert load_tokenizer(cut.out).digest == load_tokenizer(whole.out).digest


def test_a_start_that_dies_before_the_tokenizer_is_written_writes_it_next_time(training: Make) -> None:
    trained = training("t")
    trained.start()
    digest = load_tokenizer(trained.out).digest
    (trained.run / "DONE").unlink()
    trained.out.unlink()
    lines = trained.lines(), trained.lines("validation.jsonl")
    assert trained.start() == "DONE"
    assert load_tokenizer(trained.out).digest == digest
    assert (trained.lines(), trained.lines("validation.jsonl")) == lines


def test_a_killed_training_goes_on_from_its_newest_whole_checkpoint(training: Make) -> None:
    settings = {"steps": 8, "checkpoint": {"every_steps": 3, "every_minutes": None}}
    whole, cut = training("whole", **settings), training("cut", **settings)
    whole.start()
    shutil.copytree(whole.run, cut.run)
    (cut.run / "DONE").unlink()
    shutil.rmtree(next((cut.run / "checkpoints").glob("step-00000008.*")))
    (weights,) = (cut.run / "checkpoints").glob("step-00000006.*/rank-00000.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cut.start() == "DONE"
    assert cut.lines() == whole.lines()
    assert load_tokenizer(cut.out).digest == load_tokenizer(whole.out).digest
    assert list((cut.run / "checkpoints").glob("step-00000006.*.bad"))


def test_accumulation_changes_nothing_but_the_order_of_sums(training: Make) -> None:
    """Same images, noise and usage term: the usage term is that of the batch, not of a micro-batch."""
    whole, cut = training("whole", usage_weight=50.0), training("cut", usage_weight=50.0, micro_batch=1)
    whole.start()
    cut.start()
    for name in ("loss", "kl", "usage_kl", "grad_norm"):
        got, expected = ([line[name] for line in run.lines()] for run in (cut, whole))
        assert got == pytest.approx(expected, rel=2e-3, abs=1e-5), name


def test_training_lowers_the_loss(training: Make) -> None:
    """At temperature 1 and without KL."""
    settings = {"lr": 5e-3, "warmup_steps": 0, "kl_weight": 0.0, "usage_weight": 0.0, "temperature": [1.0, 1.0]}
    trained = training("t", steps=60, batch=8, **settings)
    trained.start()
    losses = [line["loss"] for line in trained.lines()]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


def test_measurements_and_pictures_come_at_the_interval_and_at_the_end(training: Make) -> None:
    trained = training("t", steps=7, measure_every_steps=3)
    trained.start()
    names = ["step-00000003.png", "step-00000006.png", "step-00000007.png"]
    assert sorted(path.name for path in (trained.run / "pictures").iterdir()) == names
    measured = trained.lines("validation.jsonl")
    assert [line["step"] for line in measured] == [3, 6, 7]
    for line in measured:
        assert line["used"] + line["dead"] == line["vocabulary"] == 16
        assert 1 <= line["perplexity"] <= line["used"]
    assert tokenizer_extra(trained.out)["quality"]["psnr"] == measured[-1]["psnr"]


def test_a_tar_trains_like_the_folder_it_was_made_of(training: Make, tmp_path: Path, images: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, arcname=".")
    from_tar, from_folder = training("a", tmp_path / "images.tar"), training("b", cache_gib=0)
    from_tar.start()
    from_folder.start()
    assert load_tokenizer(from_tar.out).digest == load_tokenizer(from_folder.out).digest


def test_images_at_a_url_train_like_those_here(training: Make, images: Path) -> None:
    place = open_place(f"memory://{uuid.uuid4()}/images")
    for image in filter(Path.is_file, images.rglob("*")):
        place.write(image.relative_to(images).as_posix(), image.read_bytes())
    there, here = training("a", str(place)), training("b")
    assert there.start() == here.start() == "DONE"
    assert load_tokenizer(there.out).digest == load_tokenizer(here.out).digest


def test_a_stop_while_images_are_read_leaves_the_run_as_it_was(
    training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, trained = training("whole", steps=9), training("t", steps=9)
    assert whole.start() == "DONE"
    assert trained.start(StopAfter(5)) == "PREEMPTED"
    before = trained.state()
    monkeypatch.setattr(crops, "_AT_ONCE", 4)
    stop = StopAfter(0)
    looks: list[bool] = []

    def tried(self: crops.ImagePool, file: ImageFile) -> Any:
        looks.append(True)
        if len(looks) == 4:
            assert stop.requested
        return decode(self, file)

    decode = crops.ImagePool._try
    with monkeypatch.context() as patch:
        patch.setattr(crops.ImagePool, "_try", tried)
        assert trained.start(stop) == "PREEMPTED"
    assert len(looks) == 4  # of 12
    marker = json.loads((trained.run / "PREEMPTED").read_text())
    assert (marker["step"], marker["reason"], marker["attempt"]) == (5, "SIGTERM", 2)
    assert trained.state() == before
    assert trained.start() == "DONE"
    assert load_tokenizer(trained.out).digest == load_tokenizer(whole.out).digest


def test_a_stop_while_images_are_read_leaves_no_marker_beside_a_newer_start(
    training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = training("t")
    stop = StopAfter(0)

    def tried(self: crops.ImagePool, file: ImageFile) -> Any:
        assert stop.requested
        (trained.run / "checkpoints" / "attempts" / "000002").touch()
        return decode(self, file)

    decode = crops.ImagePool._try
    monkeypatch.setattr(crops.ImagePool, "_try", tried)
    with pytest.raises(SupersededError, match="superseded by attempt 2"):
        trained.start(stop)
    assert not (trained.run / "PREEMPTED").exists()


def test_a_broken_image_is_left_out_and_named(training: Make, images: Path, capsys: Any) -> None:
    (images / "00.png").write_bytes(b"not an image")
    trained = training("t")
    trained.start()
    assert tokenizer_extra(trained.out)["images"] == 11
    assert "1 images left out, first" in (shown := capsys.readouterr().out)
    assert "00.png" in shown


def test_too_few_images_are_refused(training: Make) -> None:
    with pytest.raises(DataError, match="got 12 usable images, expected at least 13"):
        training("t", held_out=12).start()


def test_another_training_in_the_same_folder_is_refused(training: Make, images: Path) -> None:
    trained = training("t", steps=4)
    trained.start()
    with pytest.raises(CheckpointError, match="batch was 4, now 6"):
        trained.start(steps=8, batch=6)
    with pytest.raises(CheckpointError, match=r"model\.vocabulary was 16, now 8"):
        trained.start(steps=8, model={"vocabulary": 8, "hidden": 8, "blocks_per_group": 1, "decoder_input": 8})
    # It has not taken over, as a start that is under way would end then.
    assert [path.name for path in (trained.run / "checkpoints" / "attempts").iterdir()] == ["000001"]
    (images / "new.png").write_bytes((images / "00.png").read_bytes())
    with pytest.raises(CheckpointError, match="begun on other images"):
        trained.start(steps=8)


def test_other_images_of_the_same_sizes_are_refused(training: Make, images: Path) -> None:
    trained = training("t", steps=4)
    assert trained.start(StopAfter(2)) == "PREEMPTED"
    path = images / "00.png"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="begun on other images"):
        trained.start()


def test_a_resume_that_an_older_version_began_says_that_the_list_may_differ(
    training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = training("t", steps=4)
    with monkeypatch.context() as older:
        older.setattr(crops, "images_digest", lambda *_: "0" * 64)
        assert trained.start(StopAfter(2)) == "PREEMPTED"
    with pytest.raises(CheckpointError, match=r"by an older version.*Start anew in another run folder, or finish"):
        trained.start()


def test_a_tokenizer_among_its_images_is_left_out_and_can_be_resumed(training: Make, images: Path) -> None:
    """Nor are its run and its pictures, for it and for any other."""
    apart, inside = training("t", steps=5), training("t", steps=5)
    inside.out = images / "t.safetensors"
    assert apart.start() == "DONE"
    assert inside.start(StopAfter(3)) == "PREEMPTED"
    assert inside.start() == "DONE"
    assert load_tokenizer(inside.out).digest == load_tokenizer(apart.out).digest
    assert inside.start(steps=6) == "DONE"
    assert {path.name for path in images.rglob("*.png")} >= {"t.png", "step-00000005.png"}
    assert len(find_images(str(images))) == 12


def test_more_steps_go_on_with_a_training_that_was_done(training: Make, capsys: Any) -> None:
    trained = training("t", steps=4)
    trained.start()
    assert trained.start(steps=6) == "DONE"
    assert "changed on resume: steps was 4, now 6" in capsys.readouterr().out
    assert [line["step"] for line in trained.lines()] == list(range(1, 7))
    assert tokenizer_extra(trained.out)["steps"] == 6


def test_schedules_reach_their_ends(training: Make) -> None:
    recipe = training("t").recipe(steps=100, lr_steps=50, warmup_steps=10, lr=1e-3, min_lr=1e-5, kl_weight=6.6)
    now: Any = SimpleNamespace(parts=SimpleNamespace(recipe=recipe), progress=Progress())

    def at(step: int) -> tuple[float, ...]:
        now.progress.step = step
        return tuple(getattr(TokenizerTrainer, name).fget(now) for name in ("temperature", "kl_weight", "lr"))

    assert at(0) == (1.0, 0.0, pytest.approx(1e-3 / 11))
    assert at(25)[1] == 6.6
    assert at(75)[0] == 1 / 16
    assert at(50) == (pytest.approx((1 + 1 / 16) / 2, abs=0.3), 6.6, pytest.approx(1e-5))
    assert at(100) == (1 / 16, 6.6, pytest.approx(1e-5))


def test_gradients_that_are_not_finite_change_nothing_are_counted_and_bounded(
    training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.noise_of_rows
    broken = range(2, 5)

    def noise(seed: int, step: int, *rest: Any) -> torch.Tensor:
        return original(seed, step, *rest) * (torch.nan if step in broken else 1)

    averaged = []
    update = loop.WeightAverage.update
    monkeypatch.setattr(loop.WeightAverage, "update", lambda self, **most: averaged.append(update(self, **most)))
    monkeypatch.setattr(loop, "noise_of_rows", noise)
    trained = training("t", steps=8, max_skipped_in_a_row=4)
    assert trained.start() == "DONE"
    assert len(averaged) == 5
    assert [line["step"] for line in trained.lines() if line["skipped"]] == [3, 4, 5]
    assert tokenizer_extra(trained.out)["skipped"] == 3
    for name, tensor in load_tokenizer(trained.out).state_dict().items():
        assert bool(tensor.isfinite().all()), name

    broken = range(2, 9)
    failed = training("failed", steps=8, max_skipped_in_a_row=4)
    with pytest.raises(TrainingError, match="4 steps in a row up to step 6"):
        failed.start()
    assert not failed.out.exists()


def test_a_collapsed_codebook_stops_the_training_and_leaves_no_file(training: Make) -> None:
    """A KL weight so large that every position gives up telling anything."""
    trained = training(
        "t", steps=400, kl_weight=5e3, usage_weight=0.0, collapse={"after_steps": 5, "for_steps": 20}
    )
    with pytest.raises(TrainingError, match=r"collapsed: .* usage_weight \(0\), a smaller kl_weight \(5000\)"):
        trained.start(kl_warmup_steps=1, lr=5e-2, warmup_steps=0)
    last = trained.lines()[-1]
    assert last["step"] < 400
    assert last["perplexity"] < 2
    assert not trained.out.exists()
