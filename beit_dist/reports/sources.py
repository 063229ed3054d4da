"""What is needed to draw a run besides its numbers: its recipe, and images that it has not seen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from beit_dist.checkpoints.layout import kind_of
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.errors import ConfigError, DataError, StorageError
from beit_dist.shards.manifest import HELD_OUT_NAME, Manifest, load_held_out, load_manifest
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place


def read_recipe(run: Place) -> tuple[str, dict[str, Any]]:
    """Kind of the run, and its recipe as it was written into its folder.

    Raises:
        DataError: it is no run folder.
        StorageError: the store does not answer, or refuses.
    """
    try:
        facts, recipe = json.loads(run.read("run.json")), yaml.safe_load(run.read("config.yaml"))
        return kind_of(facts), dict(recipe)
    except StorageError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(
            f"{run}: got no readable run.json and config.yaml ({error}), expected a run folder, in which training "
            "has begun"
        ) from None


@dataclass(frozen=True)
class Images:
    """Samples of a data set to look at."""

    place: Place
    manifest: Manifest
    trained_on: bool
    """Whether the run has learnt from them."""
    measured_on: bool
    """Whether they are what the run is measured on."""

    @property
    def are(self) -> str:
        """What they are, for a title."""
        return "images it was trained on" if self.trained_on else "held-out images"


def open_images(named: str | None, config: PretrainingConfig, trained_on: str) -> Images:
    """The data set to take images from: the one that is named, else held-out images, else those trained on.

    Held-out ones are in the recipe's ``validation.data``, or in the data set's folder ``held-out``.

    Args:
        named: by the user.
        config: the run's recipe.
        trained_on: digest of the data set that the run is trained on.

    Raises:
        ConfigError: neither names a data set.
        DataError: it is missing or damaged.
    """
    access, measured = config.storage.access, config.validation.data
    where = named or (measured if measured != "auto" else None)
    if where is None:
        if config.data is None:
            raise ConfigError("--data", None, "the folder of the shards", "The run's recipe does not name any.")
        held_out = load_held_out(config.data, access)
        where = config.data if held_out is None else f"{config.data.rstrip('/')}/{HELD_OUT_NAME}"
    place = open_place(where, access)
    manifest = load_manifest(place)
    seen = manifest.digest == trained_on
    return Images(place, manifest, trained_on=seen, measured_on=named is None and not seen)
