"""A pre-training recipe."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.model import ModelConfig
from beit_dist.config.probing import ProbeConfig
from beit_dist.config.reading import Section, near_divisors
from beit_dist.config.run import ValidationConfig
from beit_dist.config.vit import ViTRunConfig
from beit_dist.errors import ConfigError
from beit_dist.storage.place import is_url


class LoaderConfig(Section):
    """The order of samples and the processes that read them; ``docs/data.md`` explains it."""

    workers: int = Field(2, ge=0)
    """Reading processes per rank. 0 reads in a thread of the rank itself."""
    prefetch: int = Field(2, ge=1)
    """How many steps the workers read ahead."""
    lanes: int | None = Field(None, ge=1)
    """Number of independent streams that the data is divided into; a divisor of ``global_batch``. Null takes the
    largest divisor up to an eighth of it."""
    block_samples: int | None = Field(None, ge=1)
    """Consecutive samples of a shard that are read together. Null takes min(64, samples // (16 · lanes))."""
    window_blocks: int = Field(1, ge=1)
    """How many blocks are shuffled together."""
    memory_gib: float = Field(4.0, gt=0)
    """For ``data`` at a URL: the memory per rank for blocks fetched ahead, in GiB. If the blocks need more,
    samples are fetched one by one, which is slower. ``--dry-run`` prints how much they need."""
    cache_dir: str | None = None
    """For ``data`` at a URL: a folder on a local disk that keeps fetched blocks and is shared by the ranks of a
    host. Null keeps none."""
    cache_gib: float = Field(100.0, gt=0)
    """Largest size of ``cache_dir``, in GiB. The block that has been unused for longest is deleted first."""
    bad_samples: int = Field(0, ge=0)
    """How many damaged samples a run may leave out, each with loss weight 0, before it stops."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long the trainer waits for a batch before it gives up, in seconds."""

    @model_validator(mode="after")
    def _check(self) -> LoaderConfig:
        if self.cache_dir is not None and is_url(self.cache_dir):
            raise ConfigError("loader.cache_dir", self.cache_dir, "a folder on a local disk")
        return self


class PretrainingValidation(ValidationConfig):
    """Measurements on held-out shards, which are never trained on."""

    data: str | None = "auto"
    """Folder or URL of held-out shards, made with the same tokenizer. ``auto`` takes those that
    ``beit shards --held-out`` wrote into ``data``, if there are any. Null measures nothing."""
    probe: ProbeConfig = ProbeConfig()


class PretrainingConfig(ViTRunConfig):
    """A pre-training recipe."""

    of_the_host: ClassVar[frozenset[str]] = ViTRunConfig.of_the_host | {"tokenizer", "loader"}

    data: str | None = None
    validation: PretrainingValidation = PretrainingValidation()
    tokenizer: str | None = None
    """Tokenizer file. If it is set, the run checks that the shards were made with it."""
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    epochs: float = Field(800, gt=0)
    loader: LoaderConfig = LoaderConfig()
    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass and recompute the rest: less memory, a third more
    arithmetic, the same gradients."""

    @model_validator(mode="after")
    def _check(self) -> PretrainingConfig:
        self.timeouts.check_loader(self.loader.timeout_seconds)
        lanes = self.loader.lanes
        if lanes is not None and self.global_batch % lanes:
            raise ConfigError(
                "loader.lanes",
                lanes,
                f"a divisor of global_batch ({self.global_batch})",
                f"The nearest divisors: {near_divisors(self.global_batch, lanes)}.",
            )
        return self

    def probed_every(self, steps: int) -> int:
        """Steps between probes of a run of so many steps."""
        return self.validation.probe.every_steps or self.measured_every(steps)

    @property
    def lanes(self) -> int:
        """``loader.lanes``, or the largest divisor of the global batch up to an eighth of it."""
        if self.loader.lanes is not None:
            return self.loader.lanes
        most = max(1, self.global_batch // 8)
        return next(lanes for lanes in range(most, 0, -1) if self.global_batch % lanes == 0)
