"""Training a tokenizer is reproducible, learns, goes on exactly where it stopped, and says when it fails."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import time
import uuid
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tokenizers import StopAfter

from beit_dist.checkpoints.layout import committed
from beit_dist.engine import saving
from beit_dist.engine import trainer as loop
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.engine.schedule import schedule_of
from beit_dist.engine.task import Progress
from beit_dist.errors import CheckpointError, ConfigError, DataError, TrainingError
from beit_dist.images import crops
from beit_dist.images.files import ImageFile, find_images
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.tasks.tokenizer import task as tokenizer
from beit_dist.weights.tokenizer_files import load_tokenizer, tokenizer_extra

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
    assert Image.open(trained.out.with_suffix(".png")).height > 2 * 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "t.png", "t.run", "t.safetensors"]
    assert trained.start(kl_weight=0.2) == "DONE"  # says that it is done already, and with what
    assert "kl_weight was 0.1, now 0.2\nalready done" in capsys.readouterr().out
    assert not (trained.run / "checkpoints" / "attempts" / "000002").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_and_resumed_training_equals_one_that_never_stopped(training: Make, stage: str) -> None:
    settings: dict[str, Any] = {"steps": 9, "validation": {"every_steps": 4}, "micro_batch": 2}
    whole, cut = training("whole", **settings), training("cut", **settings)
    assert whole.start(ds=STAGES[stage]) == "DONE"
    assert cut.start(StopAfter(6), STAGES[stage]) == "PREEMPTED"  # it is looked at while measuring too
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
    settings = {"kl_weight": 0.0, "usage_weight": 0.0, "temperature": [1.0, 1.0]}
    trained = training("t", steps=60, global_batch=8, optimizer={"lr": 5e-3, "warmup_steps": 0}, **settings)
    trained.start()
    losses = [line["loss"] for line in trained.lines()]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


def test_a_start_from_clusters_uses_tokens_untrained_and_resumes_like_any_other(training: Make) -> None:
    """With a learning rate of next to nothing, what is measured is the start."""
    still = {"optimizer": {"lr": 1e-12, "min_lr": 0.0}, "steps": 6}
    noise, clusters = training("noise", **still), training("clusters", start="clusters", **still)
    assert [noise.start(), clusters.start()] == ["DONE"] * 2
    (first, second) = (each.lines("validation.jsonl")[-1] for each in (noise, clusters))
    assert second["perplexity"] > first["perplexity"] + 2
    assert second["used"] > first["used"]
    cut = training("cut", start="clusters", **still)
    assert cut.start(StopAfter(4)) == "PREEMPTED"
    assert cut.start() == "DONE"
    assert load_tokenizer(cut.out).digest == load_tokenizer(clusters.out).digest
    with pytest.raises(CheckpointError, match="start was 'clusters', now 'random'"):
        clusters.start(start="random", steps=7)


@pytest.mark.parametrize("stage", STAGES)
def test_an_encoder_without_a_learning_rate_stays_as_it_began(training: Make, stage: str) -> None:
    """And the decoder does not."""
    changes = {"start": "clusters", "ema": {"decay": None}, "optimizer": {"weight_decay": 0.1}}
    models = {}
    for steps, share in ((1, 0.0), (4, 0.0), (4, 0.5)):
        trained = training(f"{steps}-{share}", steps=steps, encoder_lr_share=share, **changes)
        assert trained.start(ds=STAGES[stage]) == "DONE"
        models[steps, share] = load_tokenizer(trained.out).state_dict()
    short, long, moved = models.values()
    for name, values in long.items():
        assert torch.equal(values, short[name]) == name.startswith("encoder."), name
    assert not torch.equal(moved["encoder.blocks.input.w"], long["encoder.blocks.input.w"])


def test_the_end_gives_a_verdict_beside_its_baselines(training: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trained = training("t")
    trained.start()
    told, about = json.loads((trained.run / "DONE").read_text()), tokenizer_extra(trained.out)
    assert told["verdict"] == about["verdict"]
    assert told["baselines"] == about["baselines"]
    assert told["baselines"]["mean_colour"] >= told["baselines"]["palette"] > 10
    assert f"verdict: {told['verdict']['word']}. " in capsys.readouterr().out


def test_what_the_recipe_calls_collapsed_is_called_so_at_the_end(training: Make) -> None:
    trained = training("t", steps=2, collapse={"below": 0.999})  # too short for the alarm
    assert trained.start() == "DONE"
    assert json.loads((trained.run / "DONE").read_text())["verdict"]["word"] == "collapsed"


def test_a_save_by_the_clock_is_one_save(training: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks learn of it while the next step is under way, which must not ask for another."""
    clock = count()
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    trained = training("t", steps=30, checkpoint={"every_minutes": 0.1, "keep": 99})
    assert trained.start() == "DONE"
    steps = sorted(saved.step for saved in committed(LocalPlace(trained.run / "checkpoints")))
    assert len(steps) > 3
    assert all(after - before > 1 for before, after in pairwise(steps[:-1])), steps


def test_measurements_and_pictures_come_at_the_interval_and_at_the_end(training: Make) -> None:
    trained = training("t", steps=7, validation={"every_steps": 3})
    trained.start()
    names = ["step-00000003.png", "step-00000006.png", "step-00000007.png"]
    assert sorted(path.name for path in (trained.run / "pictures").iterdir()) == names
    measured = trained.lines("validation.jsonl")
    assert [line["step"] for line in measured] == [3, 6, 7]
    for line in measured:
        assert line["used"] + line["dead"] == line["vocabulary"] == 16
        assert 1 <= line["perplexity"] <= line["used"]
    assert tokenizer_extra(trained.out)["quality"]["psnr"] == measured[-1]["psnr"]


def test_a_stop_while_it_measures_ends_it_and_the_measurement_is_made_up_for(training: Make) -> None:
    settings = {"steps": 6, "validation": {"every_steps": 3}}
    whole, cut = training("whole", **settings), training("cut", **settings)
    assert whole.start() == "DONE"
    assert cut.start(StopAfter(4)) == "PREEMPTED"  # looked at for four steps, and then in the measurement
    assert cut.state()[0] == 3
    assert not (cut.run / "validation.jsonl").read_text()
    assert cut.start() == "DONE"
    assert cut.lines("validation.jsonl") == whole.lines("validation.jsonl")
    assert load_tokenizer(cut.out).digest == load_tokenizer(whole.out).digest


def test_held_out_images_of_another_source_are_measured_and_none_is_kept_aside(
    training: Make, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(images / "sub", other)
    trained = training("t", validation={"data": str(other), "samples": 4})
    assert trained.start() == "DONE"
    assert re.search(r"held out +4 images", capsys.readouterr().out)
    assert json.loads((trained.run / "metrics.jsonl").read_text().splitlines()[2])["epoch"] == 1.0  # all 12 images
    with pytest.raises(ConfigError, match=r"validation\.data: .*not trained on, but .*00\.png is"):
        training("u", validation={"data": str(images)}).start()
    with pytest.raises(CheckpointError, match=r"it kept 0 images of data aside, and this start keeps 3"):
        trained.start(steps=8, validation={})  # as if it had not been said: other images would be trained on


def test_a_new_training_can_start_from_a_tokenizer_and_from_a_run(training: Make, images: Path) -> None:
    first = training("first")
    assert first.start() == "DONE"
    for name, source in (("file", first.out), ("run", first.run)):
        trained = training(name, init_from=str(source), steps=1, optimizer={"lr": 1e-9, "min_lr": 0})
        assert trained.start() == "DONE"
        assert trained.facts()["init_from"]["source"] == str(source)
    weights = [load_tokenizer(images.parent / f"{name}.safetensors").state_dict() for name in ("first", "file")]
    for name in weights[0]:  # what is written is the average
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-6)
    other = training("other", init_from=str(first.out), model={"vocabulary": 8, "hidden": 8})
    with pytest.raises(ConfigError, match=r"init_from: got .*, expected a tokenizer of the sizes of this recipe"):
        other.start()
    assert not other.run.exists()


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
    rarely = {"every_steps": 100}
    whole, trained = training("whole", steps=9, validation=rarely), training("t", steps=9, validation=rarely)
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
        (attempts := trained.run / "checkpoints" / "attempts").mkdir(parents=True, exist_ok=True)
        (attempts / "000001").touch()
        return decode(self, file)

    decode = crops.ImagePool._try
    monkeypatch.setattr(crops.ImagePool, "_try", tried)
    with pytest.raises(SupersededError, match="superseded by attempt 1"):
        trained.start(stop)
    assert not (trained.run / "PREEMPTED").exists()


def test_a_broken_image_is_left_out_and_named(training: Make, images: Path, capsys: Any) -> None:
    (images / "00.png").write_bytes(b"not an image")
    trained = training("t")
    trained.start()
    assert tokenizer_extra(trained.out)["images"] == 11
    assert "1 image left out, the first is" in (shown := capsys.readouterr().out)
    assert "00.png" in shown


def test_too_few_images_are_refused(training: Make) -> None:
    with pytest.raises(DataError, match="data: got 12 images, expected more than the 12 of held_out"):
        training("t", held_out=12).start()


def test_another_training_in_the_same_folder_is_refused(training: Make, images: Path) -> None:
    trained = training("t", steps=4)
    trained.start()
    with pytest.raises(CheckpointError, match="global_batch was 4, now 6"):
        trained.start(steps=8, global_batch=6)
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
    with pytest.raises(
        CheckpointError, match=r"by an older version.*Start again in another run folder, or finish"
    ):
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
    optimizer = {"lr_steps": 50, "warmup_steps": 10, "lr": 1e-3, "min_lr": 1e-5}
    config = training("t").config(steps=100, optimizer=optimizer, kl_weight=6.6)
    task = tokenizer.TokenizerTraining(config, Path("t.safetensors"))
    schedule = schedule_of(config, 40, config.global_batch)
    now: Any = SimpleNamespace(progress=Progress())
    task._running = now

    def at(step: int) -> tuple[float, ...]:
        now.progress.step = step
        known = task.begin(torch.zeros(0), []).known
        return known["temperature"], known["kl_weight"], schedule.lr(step)

    assert at(0) == (1.0, 0.0, 0.0)
    assert at(25)[1] == 6.6
    assert at(75)[0] == 1 / 16
    assert at(50) == (pytest.approx((1 + 1 / 16) / 2, abs=0.3), 6.6, pytest.approx(1e-5))
    assert at(100) == (1 / 16, 6.6, pytest.approx(1e-5))


def test_gradients_that_are_not_finite_change_nothing_are_counted_and_bounded(
    training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tokenizer.noise_of_rows
    broken = range(2, 5)

    def noise(seed: int, step: int, *rest: Any) -> torch.Tensor:
        return original(seed, step, *rest) * (torch.nan if step in broken else 1)

    averaged = []
    update = loop.WeightAverage.update
    monkeypatch.setattr(loop.WeightAverage, "update", lambda self, **most: averaged.append(update(self, **most)))
    monkeypatch.setattr(tokenizer, "noise_of_rows", noise)
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
        trained.start(kl_warmup_steps=1, optimizer={"lr": 5e-2, "warmup_steps": 0})
    last = trained.lines()[-1]
    assert last["step"] < 400
    assert last["perplexity"] < 2
    assert not trained.out.exists()
