"""What a job says of itself at its end."""

from __future__ import annotations

import shlex

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.config.recipes import named
from beit_dist.shards.sample import SampleLayout
from beit_dist.tokenizing.describing import next_command


@pytest.mark.parametrize(
    ("samples", "recipe"), [(700, "small_data"), (50_000, "beit_small"), (1_281_167, "beit_base")]
)
@pytest.mark.parametrize("sizes", [(224, 16, 8192), (112, 8, 512), (224, 16, 512)])
def test_the_command_that_is_proposed_trains_on_these_shards(
    sizes: tuple[int, int, int], samples: int, recipe: str
) -> None:
    words = shlex.split(next_command("my shards", SampleLayout(*sizes), samples))
    assert words[:8] == ["beit", "train", "--config", recipe, "--data", "my shards", "--run", "runs/first"]
    model = load_recipe(PretrainingConfig, named("pretraining", recipe), words[8:]).model
    assert (model.image_size, model.patch_size, model.vocabulary) == sizes
