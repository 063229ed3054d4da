"""The settings of a tokenizer's training; those shared with pre-training are in ``beit_dist/config/run.py``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from beit_dist.config.dvae import DVAEConfig
from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.config.reading import Section
from beit_dist.config.run import EMAConfig, RunConfig
from beit_dist.errors import ConfigError

_STEPS, _MOST_WARMUP = 20_000, 100
_COLLAPSED = 0.02  # of the vocabulary
_LEAST_PATIENCE, _MOST_PATIENCE = 50, 2000


class CollapseConfig(Section):
    """When the codebook counts as collapsed, that is, when nearly all positions take the same few tokens."""

    below: float | None = Field(_COLLAPSED, gt=0, lt=1)
    """Perplexity below which the codebook counts as collapsed, as a share of the vocabulary; a perplexity below 2
    always does. Null never stops the training, and judges the finished tokenizer by the default."""
    after_steps: int | None = Field(None, ge=0)
    """Steps at the beginning that are not judged. Null takes the steps in which the KL weight rises."""
    for_steps: int | None = Field(None, ge=1)
    """How many steps in a row the codebook must be collapsed before the training stops. Null takes a twentieth of
    ``steps``, at least 50 and at most 2,000."""


class TokenizerOptimizer(OptimizerConfig):
    """The optimizer and its schedule, with a tokenizer's defaults."""

    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    clip_grad: float = Field(1.0, ge=0)
    warmup_steps: int | None = Field(None, ge=0)
    """Null takes a twentieth of ``steps``, at most 100."""


class TokenizerEMA(EMAConfig):
    """The averaged weights, which are the ones that are measured and written."""

    decay: float | None = Field(0.999, gt=0, lt=1)
    """The averaged weights become the tokenizer. Null takes the last weights."""


class TokenizerConfig(RunConfig):
    """The training of a tokenizer, a discrete VAE (DALL-E paper, appendix A.2)."""

    of_the_host: ClassVar[frozenset[str]] = RunConfig.of_the_host | {"workers", "cache_gib"}

    model: DVAEConfig = DVAEConfig()
    start: Literal["random", "clusters"] = "random"
    """The initial weights. ``random``: noise, as in the paper. ``clusters``: clusters of some training patches are
    the first tokens, which saves a short training most of its way."""
    encoder_lr_share: float = Field(1.0, ge=0, le=1)
    """The encoder's learning rate, as a share of the decoder's. After a start from clusters, a small share keeps
    their tokens in use while the decoder learns to draw them; 0 leaves the encoder unchanged."""
    global_batch: int = Field(64, ge=1)
    micro_batch: int = Field(64, ge=1)
    steps: int = Field(_STEPS, ge=1)
    optimizer: TokenizerOptimizer = TokenizerOptimizer()
    ema: TokenizerEMA = TokenizerEMA()
    view_size: int = Field(112, ge=8)
    """Side of the images that will be tokenized, in pixels, a multiple of 8. Quality is measured at this size."""
    image_size: int = Field(112, ge=8)
    """Side of the training crops, in pixels, a multiple of 8. A value below ``view_size`` trains on parts of
    views, which is cheaper."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest side of the square that becomes a view, as a share of the shorter side of the image."""
    temperature: tuple[float, float] = (1.0, 1 / 16)
    """Gumbel-softmax temperature at the start and at the end of its cosine schedule."""
    temperature_steps: int | None = Field(None, ge=1)
    """Length of that schedule, in steps. Null takes three quarters of ``steps``."""
    kl_weight: float = Field(6.6, ge=0)
    """Final weight of the KL term, in the paper's units: the loss is divided by the number of pixel values."""
    kl_warmup_steps: int | None = Field(None, ge=1)
    """Steps over which the KL weight rises from 0, on a cosine. Null takes a quarter of ``steps``."""
    usage_weight: float = Field(0.0, ge=0)
    """Weight of the usage term, in the same units: the KL of the batch's average token distribution to the uniform
    one. It keeps the codebook in use in short training runs on little data. The paper has no such term."""
    held_out: int = Field(64, ge=1)
    """How many images to hold out for measurements, if ``validation.data`` names none."""
    collapse: CollapseConfig = CollapseConfig()
    workers: int = Field(2, ge=1)
    """Threads per rank that decode and crop images."""
    cache_gib: float = Field(2.0, ge=0)
    """Memory per rank for decoded images, in GiB. Images that do not fit are decoded again each time."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        if not self.model.decoder_input:
            raise ConfigError("model.decoder_input", 0, "1 or more: training a tokenizer needs the decoder")
        if self.epochs is not None:
            raise ConfigError(
                "epochs", self.epochs, "null: a tokenizer's schedules count steps", "Set steps instead."
            )
        for field, size in (("image_size", self.image_size), ("view_size", self.view_size)):
            if size % 8:
                raise ConfigError(field, size, "a multiple of 8, the encoder's stride")
        if self.image_size > self.view_size:
            raise ConfigError("image_size", self.image_size, f"at most view_size ({self.view_size})")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(
                "crop_scale", self.crop_scale, "two shares, the smaller one first, above 0 and at most 1"
            )
        if not 0 < self.temperature[1] <= self.temperature[0]:
            raise ConfigError(
                "temperature", self.temperature, "start and end, the end above 0 and not above the start"
            )
        return self

    @property
    def default_warmup(self) -> int:
        """A twentieth of the steps, up to 100."""
        return min(_MOST_WARMUP, self.steps // 20)

    @property
    def kl_rise(self) -> int:
        """``kl_warmup_steps``, or a quarter of the steps."""
        return self.kl_warmup_steps or max(1, self.steps // 4)

    @property
    def temperature_fall(self) -> int:
        """``temperature_steps``, or three quarters of the steps."""
        return self.temperature_steps or max(1, self.steps * 3 // 4)

    @property
    def judged_after(self) -> int:
        """Steps at the beginning in which the use of the codebook is not judged."""
        given = self.collapse.after_steps
        return self.kl_rise if given is None else given

    @property
    def collapse_patience(self) -> int:
        """How many steps in a row may use too few tokens before the training stops."""
        return self.collapse.for_steps or min(_MOST_PATIENCE, max(_LEAST_PATIENCE, self.steps // 20))

    @property
    def least_perplexity(self) -> float:
        """Perplexity below which the codebook counts as collapsed."""
        return max(2.0, (self.collapse.below or _COLLAPSED) * self.model.vocabulary)
