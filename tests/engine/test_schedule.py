"""Learning rates at every corner of the original's schedule (unilm ``utils.cosine_scheduler``)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine.schedule import schedule_of, steps_of
from beit_dist.errors import ConfigError


def recipe(*overrides: str) -> PretrainingConfig:
    settings = ["run=r", "global_batch=10", "epochs=4", "optimizer.lr=1.0", "optimizer.min_lr=0.1", *overrides]
    return load_recipe(PretrainingConfig, None, settings)


def original(base: float, final: float, total: int, warmup: int) -> list[float]:
    """The original's per-step list, from its description: an inclusive ramp from 0, then a cosine."""
    ramp = [base * i / (warmup - 1) if warmup > 1 else 0.0 for i in range(warmup)]
    rest = total - warmup
    return ramp + [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 39])
def test_learning_rates_are_the_originals_at_every_step(warmup: int) -> None:
    schedule = schedule_of(recipe(f"optimizer.warmup_steps={warmup}"), samples=100, first_batch=10)
    got = [schedule.lr(t) for t in range(40)]
    assert got == pytest.approx(original(1.0, 0.1, 40, warmup), abs=1e-12)


def test_first_update_has_rate_zero_and_the_peak_comes_twice() -> None:
    schedule = schedule_of(recipe("optimizer.warmup_epochs=0.5"), samples=100, first_batch=10)
    assert schedule.warmup == 5
    assert [schedule.lr(t) for t in (0, 4, 5)] == [0.0, 1.0, 1.0]
    assert schedule.lr(6) < 1.0
    assert schedule.lr(40) == pytest.approx(0.1)
    assert schedule.lr(1000) == pytest.approx(0.1)


def test_time_is_counted_in_samples_so_another_batch_keeps_its_place() -> None:
    small = schedule_of(recipe(), samples=100, first_batch=10)
    large = schedule_of(recipe("global_batch=20"), samples=100, first_batch=10)
    assert [small.lr(t) for t in (0, 10, 20, 30)] == [large.lr(t) for t in (0, 10, 20, 30)]


def test_steps_cover_the_epochs() -> None:
    assert steps_of(recipe(), 100) == 40
    assert steps_of(recipe(), 101) == 41
    assert steps_of(recipe("epochs=0.25"), 101) == 3
    assert steps_of(recipe("steps=7"), 101) == 7


def test_steps_are_counted_from_the_decimal_that_the_user_wrote() -> None:
    """1.1 epochs of 7,000 samples are 7,700, though the binary number is a little more than eleven tenths."""
    for epochs, samples, batch, steps in [
        ("1.1", 7000, 100, 77),
        ("0.1", 1000, 1, 100),
        ("0.07", 10_000, 7, 100),
        ("1e-2", 700, 7, 1),
        ("800", 1_281_167, 2048, 500_456),
    ]:
        config = recipe(f"epochs={epochs}", f"global_batch={batch}")
        assert steps_of(config, samples) == steps, epochs
        assert schedule_of(config, samples, batch).total == steps, epochs
    assert schedule_of(recipe("optimizer.warmup_epochs=1.1"), samples=70, first_batch=11).warmup == 7


def test_a_run_continued_with_another_batch_ends_when_its_epochs_are_complete() -> None:
    """4 epochs of 100 samples; 20 steps of 10 have trained on 200."""
    assert steps_of(recipe("global_batch=20"), 100, step=20, trained=200) == 30
    assert steps_of(recipe("global_batch=30"), 100, step=20, trained=200) == 27
    assert steps_of(recipe("epochs=1"), 100, step=20, trained=200) == 20
    config = recipe("steps=30", "global_batch=20")
    assert steps_of(config, 100, step=20, trained=200) == 30
    assert schedule_of(config, 100, 10, step=20, trained=200).total == 40  # in first batches
    assert schedule_of(recipe("global_batch=20"), 100, 10, step=20, trained=200).total == 40


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps: got 40, expected .* Lower optimizer.warm"):
        schedule_of(recipe("optimizer.warmup_steps=40"), samples=100, first_batch=10)


def test_the_last_epochs_mean_rate_is_that_of_the_authors_log() -> None:
    """1.0015e-5, base on ImageNet-1k for 300 epochs (microsoft/unilm issue 383); that log has means of epochs."""
    images, batch = 1_281_167, 2048
    base = Path(__file__).parents[2] / "configs" / "beit_base.yaml"
    config = load_recipe(PretrainingConfig, base, ["epochs=300"])
    schedule = schedule_of(config, images, batch)
    assert schedule.warmup == pytest.approx(10 * 625.6, rel=1e-4)
    end, epoch = steps_of(config, images), images // batch
    assert (end, epoch) == (187_671, 625)
    rates = [schedule.lr(t) for t in range(end - epoch, end)]
    assert sum(rates) / epoch == pytest.approx(1.0015e-5, rel=5e-5)
    assert max(schedule.lr(t) for t in range(end)) == 1.5e-3  # though the warm-up takes 6255.7 steps
    assert schedule.lr(0) == 0.0
