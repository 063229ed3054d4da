"""The optimizer and its schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from beit_dist.config.muon import MuonConfig
from beit_dist.config.reading import Section
from beit_dist.errors import ConfigError


class OptimizerConfig(Section):
    """The optimizer, its learning-rate schedule and gradient clipping. ``docs/optimizers.md`` compares the
    optimizers."""

    name: str = "adamw"
    """The optimizer. Settings that it does not use are ignored; ``--dry-run`` names them."""
    lr: float = Field(1.5e-3, gt=0)
    """Peak learning rate. It is absolute: nothing scales it by the batch."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the schedule; at most ``lr``."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from ``lr`` to ``min_lr`` after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the gradient's running averages, each at least 0 and below 1."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator of an update, for numerical stability."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay. Biases, norms, the class token and absolute positions have none."""
    clip_grad: float = Field(3.0, ge=0)
    """Largest global L2 norm of the gradient; 0 turns clipping off."""
    warmup_epochs: float | None = Field(None, ge=0)
    """Epochs over which the learning rate rises from 0. Set at most one ``warmup_`` setting."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the learning rate rises from 0. Set at most one ``warmup_`` setting."""
    warmup_share: float | None = Field(None, ge=0, lt=1)
    """Warm-up as a share of the schedule's steps, such as 0.05. Set at most one ``warmup_`` setting."""
    lr_steps: int | None = Field(None, ge=1)
    """Step at which the learning rate reaches ``min_lr``; null takes the end of the run."""
    muon: MuonConfig = MuonConfig()

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        lengths = {name: getattr(self, name) for name in ("warmup_epochs", "warmup_steps", "warmup_share")}
        given = {name: length for name, length in lengths.items() if length is not None}
        if len(given) > 1:
            *others, last = given
            listed = " and ".join(f"{name} ({given[name]:g})" for name in others)
            raise ConfigError(
                f"optimizer.{last}",
                given[last],
                f"only one of {listed} and {last}",
                f"Set the others to null, for example optimizer.{others[0]}=null.",
            )
        if self.min_lr > self.lr:
            raise ConfigError("optimizer.min_lr", self.min_lr, f"at most optimizer.lr ({self.lr})")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optimizer.betas", self.betas, "two numbers in [0, 1)")
        return self
