"""Muon's own settings, beside those of every optimizer."""

from __future__ import annotations

from pydantic import Field

from beit_dist.config.reading import Section


class MuonConfig(Section):
    """Used by ``optimizer.name: muon`` only. The defaults are those of its author and of torch."""

    momentum: float = Field(0.95, ge=0, lt=1)
    """Share of the momentum that is kept at each update."""
    nesterov: bool = True
    """Look ahead: orthogonalise the gradient and the momentum together, not the momentum alone."""
    ns_steps: int = Field(5, ge=1, lt=100)
    """Newton–Schulz iterations that make an update nearly orthogonal."""
