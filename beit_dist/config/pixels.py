"""How pixels are regressed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from beit_dist.config.reading import Section


class PixelsConfig(Section):
    """Used by ``model.target: pixels`` only."""

    loss: Literal["smooth_l1", "mse"] = "smooth_l1"
    """``smooth_l1``: squared up to an error of ``beta``, then linear. ``mse``: squared error, as in MAE."""
    beta: float = Field(1.0, ge=0)
    """Error of a normalised pixel at which ``smooth_l1`` becomes linear. 0 is the L1 loss of SimMIM."""
    normalise_patches: bool = False
    """Also normalise each patch by its own mean and standard deviation, as MAE does."""
