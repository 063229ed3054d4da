"""How a run is probed while it trains."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, model_validator

from beit_dist.config.reading import Section, is_recorded
from beit_dist.storage.opening import check_place


class ProbeConfig(Section):
    """How well frozen features tell classes apart, measured while a model is pre-trained. Training does not notice
    it. The features are those of the averaged weights, if the run keeps them."""

    data: str | tuple[str, ...] | None = None
    """Images with labels: one or more folders of class folders, CSV files of paths and labels, tars, zips or
    parquet files. Null probes nothing. A fifth of each class is tested on, and a fifth of the others chooses layer
    and penalty: the same images every time, and in every run."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between probes; there is always one after the last step. Null takes those of ``validation``."""
    layers: tuple[int, ...] | None = None
    """Blocks whose outputs are probed, from 1. Null takes four, a quarter of the depth apart."""
    samples: int = Field(5000, ge=10)
    """Most images; taken at random, the same ones every time. With 5,000, an accuracy of the 1,000 that are tested
    on is known to about ± 1.5 %."""
    workers: int = Field(2, ge=1)
    """Threads of each rank that decode them, while a probe lasts."""

    @model_validator(mode="after")
    def _check_places(self, info: ValidationInfo) -> ProbeConfig:
        named = [self.data] if isinstance(self.data, str) else self.data or ()
        for place in named if not is_recorded(info) else ():
            check_place("validation.probe.data", place)
        return self
