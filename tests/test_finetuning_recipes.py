"""The recipes of the published fine-tunings have the original's figures (unilm ``beit/README.md`` and configs)."""

from __future__ import annotations

from typing import Any

import pytest

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.reading import load_recipe
from beit_dist.config.recipes import named, shipped
from beit_dist.engine.schedule import schedule_of

IN_1K = 1_281_167
COLUMNS = (
    *("image_size", "global_batch", "epochs", "lr", "warmup_epochs"),
    *("layer_decay", "drop_path", "weight_decay", "mixed", "clip_grad"),
)
CLASSIFICATIONS: dict[str, tuple[Any, ...]] = {
    "finetune_base_in1k": (224, 1024, 100, 4e-3, 20, 0.65, 0.1, 0.05, True, 0),
    "finetune_large_in1k": (224, 1024, 50, 1e-3, 5, 0.75, 0.2, 0.05, True, 0),
    "finetune_base_in22k": (224, 4096, 90, 3e-3, 5, 0.65, 0.2, 0.05, False, 3),
    "finetune_large_in22k": (224, 2048, 90, 2e-3, 5, 0.75, 0.2, 0.05, False, 1),
    "finetune_base_in1k_384": (384, 512, 30, 2e-5, 5, 0.85, 0.1, 1e-8, False, 0),
    "finetune_large_in1k_384": (384, 512, 30, 2e-5, 5, 0.9, 0.4, 1e-8, False, 0),
}
SEGMENTATIONS: dict[str, tuple[Any, ...]] = {
    "finetune_base_ade20k": (512, 7e-4, 0.65, 0.1, 341),
    "finetune_large_ade20k": (640, 2e-5, 0.95, 0.2, 427),
}


def recipe(name: str) -> FinetuningConfig:
    """One that ships."""
    return load_recipe(FinetuningConfig, named("finetuning", name), ["data=x"])


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_a_classification_of_the_originals_has_its_figures(name: str) -> None:
    config = recipe(name)
    optimizer, model = config.optimizer, config.model
    got = (
        *(model.image_size, config.global_batch, config.epochs, optimizer.lr, optimizer.warmup_epochs),
        *(config.layer_decay, model.drop_path, optimizer.weight_decay, config.mixing.active, optimizer.clip_grad),
    )
    assert dict(zip(COLUMNS, got, strict=True)) == dict(zip(COLUMNS, CLASSIFICATIONS[name], strict=True))
    assert (config.task, model.block_positions, model.patch_size) == ("classification", True, 16)
    assert (config.label_smoothing, config.head_scale, optimizer.min_lr) == (0.1, 0.001, 1e-6)
    augmented = config.augmentation
    assert augmented.rand_augment is not None
    assert (augmented.rand_augment.magnitude, augmented.rand_augment.std) == (9, 0.5)
    assert (augmented.erasing, augmented.color_jitter, augmented.scale) == (0.25, 0.4, (0.08, 1.0))
    assert augmented.evaluated_share(model.image_size) == (1.0 if model.image_size == 384 else 224 / 256)
    if config.mixing.active:
        assert (config.mixing.mixup, config.mixing.cutmix, config.mixing.switch) == (0.8, 1.0, 0.5)


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_a_segmentation_of_the_originals_has_its_figures(name: str) -> None:
    config = recipe(name)
    stride = round(config.segmentation.stride * config.model.image_size)
    got = (config.model.image_size, config.optimizer.lr, config.layer_decay, config.model.drop_path, stride)
    assert got == SEGMENTATIONS[name]
    assert (config.task, config.steps, config.global_batch) == ("segmentation", 160_000, 16)
    assert (config.maps.ids, config.maps.ignore_label) == ((1, 150), 0)
    assert (config.segmentation.auxiliary_weight, config.segmentation.dropout) == (0.4, 0.1)
    schedule = schedule_of(config, 20_210, 16)
    # mmseg's poly with power 1 is a line to 0, by its own count of steps from the start; ours begins at the peak.
    assert [schedule.lr(t) for t in (1500, 160_000)] == pytest.approx([config.optimizer.lr, 0])
    middle = (1500 + 160_000) / 2
    assert schedule.lr(middle) == pytest.approx(config.optimizer.lr / 2)


def test_the_warm_up_is_as_many_epochs_as_the_originals_but_for_the_images_that_it_drops() -> None:
    for name, steps in (("finetune_base_in1k", 25_022), ("finetune_large_in1k", 6255)):  # there 25,020 and 6255
        assert int(schedule_of(recipe(name), IN_1K, 1024).warmup) == steps


def test_every_recipe_of_fine_tuning_is_valid_and_of_its_kind() -> None:
    names = shipped("finetuning")
    assert set(CLASSIFICATIONS) | set(SEGMENTATIONS) <= set(names)
    assert not set(names) & (set(shipped("pretraining")) | set(shipped("tokenizer")))
    for name in names:
        config = recipe(name)
        assert (config.task == "segmentation") == ("ade20k" in name or "segment" in name)


def test_without_a_warm_up_a_twentieth_of_the_steps_is_one() -> None:
    assert load_recipe(FinetuningConfig, None, ["run=r"]).optimizer.warmup_share == 0.05
    given = load_recipe(FinetuningConfig, None, ["run=r", "optimizer.warmup_steps=3"]).optimizer
    assert (given.warmup_share, given.warmup_steps) == (None, 3)
