"""The settings that every training of a BEiT backbone has: how its blocks are computed."""

from __future__ import annotations

from typing import Literal

from beit_dist.config.run import RunConfig
from beit_dist.errors import ConfigError


class ViTRunConfig(RunConfig):
    """The settings of every training of a backbone. Each kind adds its own."""

    attention: Literal["library", "kernel"] = "library"
    """What computes attention: PyTorch (``library``), or this package's Triton kernel for GPUs (``kernel``).
    Results differ by rounding. ``docs/precision-and-memory.md`` says what is known about both."""
    fp8: bool = False
    """Compute the matrix products of the blocks in float8, forward and backward, on a GPU that supports it. Needs
    ``precision=bf16`` and ``compile=true``. Not available at ZeRO stage 3."""

    def check_engine(self, stage: int, precision: str) -> None:
        """Refuse float8 where the engine rules it out, or where it would only be slower."""
        super().check_engine(stage, precision)
        if not self.fp8:
            return
        if precision != "bf16":
            raise ConfigError(
                "fp8",
                True,
                f"false with precision {precision}: float8 is made of bf16 values",
                "Set precision=bf16.",
            )
        if stage == 3:
            raise ConfigError("fp8", True, "false at ZeRO stage 3, which needs compile=false", "Use stage 1 or 2.")
        if not self.compile:
            raise ConfigError(
                "fp8",
                True,
                "false without compile: uncompiled, finding the scales and casting take several passes over every "
                "input and cost more than the products save",
                "Set compile=true.",
            )
