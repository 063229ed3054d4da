"""What every head has in common: a linear layer behind the backbone, and all that is known about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from beit_dist.config.model import ModelConfig
from beit_dist.step_numbers import Baselines, Number

LOSS = Number(
    name="loss",
    help="Mean loss of the masked patches (for tokens: cross-entropy, in nats).",
    metric="beit_train_loss",
    held_out="beit_validation_loss",
    text="loss {:.4f}",
    better="lower",
)
"""What every head sums first."""


class Counts(NamedTuple):
    """What a data set's samples are made of, as its statistics have it."""

    tokens: NDArray[np.int64]
    """(vocabulary,), how often each token occurs."""
    pixels: NDArray[np.int64]
    """(3, 256), how often each value occurs in each channel."""


class Head(nn.Linear, ABC):
    """A head owns everything about itself. A target is a subclass and a line in ``targets.py``.

    Shapes: B samples, K positions given per sample, P patches, C width, D values of a patch, O outputs.
    """

    name: ClassVar[str]
    """What it is called in the model, and so the first part of its parameters' names."""
    numbers: ClassVar[tuple[Number, ...]]
    """What :meth:`score` sums over the masked patches, in its order: first :data:`LOSS`."""
    settings: ClassVar[frozenset[str]]
    """Names under ``model`` of the settings that are there for it."""
    shared_with_shards: ClassVar[tuple[str, ...]] = ("image_size", "patch_size")
    """Settings of the model that must be those of the shards."""
    exports: ClassVar[frozenset[str]] = frozenset()
    """Forms of other projects with a place for it (``weights/ecosystem.py``); the others refuse it, but for bare
    backbones, which leave any head out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.width, self.outputs(config))
        self.config = config

    @classmethod
    @abstractmethod
    def outputs(cls, config: ModelConfig) -> int:
        """O, the numbers that are predicted for a patch."""

    @classmethod
    @abstractmethod
    def describe(cls, config: ModelConfig) -> str:
        """What is predicted, for ``--dry-run``."""

    @abstractmethod
    def score(self, predicted: Tensor, patches: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Sums over the masked patches, one for each of :attr:`numbers`; the first has a gradient.

        Args:
            predicted: (B, K, O) in the model's precision.
            patches: (B, P, D) uint8 as they lie in a shard.
            tokens: (B, P) integers, the visual tokens of the patches.
            positions: (B, K) integers, the masked patches; -1 is padding and must count for nothing.

        Returns:
            fp32 scalars. A plain tuple: DeepSpeed's hooks look for tensors in tuples, not in other classes.
        """

    @classmethod
    def baselines(cls, config: ModelConfig, known: Counts | None, scored: Counts | None = None) -> Baselines:
        """What the numbers come to without learning from images.

        Args:
            known: of the training data, which an answer may rely on; None where they are unknown.
            scored: of the data that is answered for; None for the training data itself.
        """
        return {}

    @classmethod
    def uses(cls, config: ModelConfig) -> frozenset[str]:
        """Which of :attr:`settings` matter, given the others."""
        return cls.settings

    @classmethod
    def multiply_adds(cls, config: ModelConfig, masked: int) -> int:
        """Of one image's forward pass with so many masked patches."""
        return masked * config.width * cls.outputs(config)

    @classmethod
    def activation_bytes(cls, config: ModelConfig, masked: int, size: int) -> int:
        """Estimate of what one image keeps for the backward pass: predictions, and twice as much in fp32.

        Args:
            masked: masked patches.
            size: bytes of a value in the model's precision.
        """
        return masked * cls.outputs(config) * (size + 8)

    def reset_constants(self) -> None:
        """Compute all buffers anew, for a module that was built on the meta device."""
