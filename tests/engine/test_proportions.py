"""What is unlikely to be meant, given the size of the data, is said before the run starts, with the way out."""

from __future__ import annotations

from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine.proportions import remarks, remarks_on_time
from beit_dist.engine.schedule import schedule_of, steps_of

SUITABLE = ["run=r", "global_batch=16", "epochs=100", "optimizer.warmup_share=0.05", "validation.every_steps=100"]


def said(*settings: str, samples: int = 750, views: int = 4, evaluates: bool = True) -> list[str]:
    config = load_recipe(PretrainingConfig, None, [*SUITABLE, *settings])
    schedule = schedule_of(config, samples, config.global_batch)
    steps = steps_of(config, samples)
    return list(remarks(config, samples=samples, steps=steps, schedule=schedule, views=views, evaluates=evaluates))


def test_nothing_is_said_of_a_run_that_suits_its_data() -> None:
    assert said() == []


@pytest.mark.parametrize(
    ("settings", "more", "expected"),
    [
        (
            ["global_batch=128"],
            {},
            "17 % of the 750 images: the model is updated only 5.9 times an epoch. Try glo",
        ),
        (["optimizer.warmup_share=0.3"], {}, "the warm-up takes 30 % of the run"),
        (["epochs=5.5"], {"views": 8}, "2 of the 8 views are never trained on"),
        (["checkpoint.every_minutes=null"], {}, "the only checkpoint is the one at the end. Set"),
        (["checkpoint.every_minutes=null", "checkpoint.every_steps=5000"], {}, "the only checkpoint is the one"),
        (
            ["validation.every_steps=5000"],
            {},
            "every_steps is 5000. Try validation.every_steps=468",
        ),
    ],
)
def test_what_does_not_suit_is_said_with_the_way_out(
    settings: list[str], more: dict[str, Any], expected: str
) -> None:
    (text,) = said(*settings, **more)
    assert expected in text


def test_what_is_advised_is_not_objected_to() -> None:
    assert said("global_batch=75", "optimizer.warmup_share=0.05") == []
    assert said("epochs=8", views=8) == []
    assert said("validation.every_steps=468") == []


def test_nothing_is_said_of_held_out_images_where_there_are_none() -> None:
    assert said("validation.every_steps=5000", evaluates=False) == []


def test_a_run_shorter_than_the_minutes_between_checkpoints_has_one_at_its_end() -> None:
    config = load_recipe(PretrainingConfig, None, [*SUITABLE, "checkpoint.every_minutes=15"])
    (text,) = remarks_on_time(config, 600)
    assert "checkpoint.every_minutes is 15 and the run takes 10 min" in text
    assert list(remarks_on_time(config, 1000)) == []
    by_steps = load_recipe(PretrainingConfig, None, [*SUITABLE, "checkpoint.every_steps=100"])
    assert list(remarks_on_time(by_steps, 600)) == []
