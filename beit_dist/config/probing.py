"""How a run is probed while it trains."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, model_validator

from beit_dist.config.reading import Section, is_recorded
from beit_dist.storage.opening import check_place


class ProbeConfig(Section):
    """How well frozen features tell classes apart, measured while a model is pre-trained. Probing does not change
    the training. The features are those of the averaged weights, if the run keeps them."""

    data: str | tuple[str, ...] | None = None
    """Images with labels: one or more folders of class folders, CSV files of paths and labels, tars, zips or
    parquet files. Null probes nothing. A fifth of each class is the test set, and a fifth of the rest serves to
    choose the layer and the penalty. They are the same images every time, and in every run."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between probes; there is always one after the last step. Null takes the interval of ``validation``."""
    layers: tuple[int, ...] | None = None
    """Blocks whose outputs are probed, counted from 1. Null takes four blocks, a quarter of the depth apart."""
    samples: int = Field(5000, ge=10)
    """Largest number of images. They are chosen at random, the same ones every time. With 5,000 images, 1,000 are
    tested on, and their accuracy is known to about ± 1.5 %."""
    workers: int = Field(2, ge=1)
    """Threads per rank that decode the images during a probe."""

    @model_validator(mode="after")
    def _check_places(self, info: ValidationInfo) -> ProbeConfig:
        named = [self.data] if isinstance(self.data, str) else self.data or ()
        for place in named if not is_recorded(info) else ():
            check_place("validation.probe.data", place)
        return self
