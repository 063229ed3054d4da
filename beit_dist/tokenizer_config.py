"""The settings of a tokenizer's training; what they share with pre-training is in ``beit_dist/config.py``."""

from __future__ import annotations

from pydantic import Field, model_validator

from beit_dist.config import (
    CheckpointConfig,
    DVAEConfig,
    LoggingConfig,
    Precision,
    StorageConfig,
    TimeoutsConfig,
    WatchdogConfig,
)
from beit_dist.errors import ConfigError
from beit_dist.settings import Section
from beit_dist.storage.place import check_place

_COLLAPSED = 0.02  # of the vocabulary
_LEAST_PATIENCE, _MOST_PATIENCE = 50, 2000


class CollapseConfig(Section):
    """When the codebook counts as collapsed: nearly all positions take the same few tokens."""

    below: float | None = Field(_COLLAPSED, gt=0, lt=1)
    """Perplexity, as a share of the vocabulary, under which the codebook counts as collapsed (and under 2 in any
    case), in training and in the tokenizer that is written; null never stops a training for it, and warns of what
    is written as the default does."""
    after_steps: int | None = Field(None, ge=0)
    """Steps that are not judged; by default those in which the KL weight rises."""
    for_steps: int | None = Field(None, ge=1)
    """Steps in a row after which the training stops; by default a twentieth of ``steps``, from 50 to 2,000."""


class TokenizerRecipe(Section):
    """How ``tools/train_tokenizer.py`` trains a dVAE (DALL-E paper, appendix A.2)."""

    run: str | None = None
    """The run folder, or its URL: checkpoints, metrics, pictures, markers. A run found there is resumed. By
    default beside the tokenizer, ``FILE.run`` for ``FILE.safetensors``."""
    model: DVAEConfig = DVAEConfig()
    view_size: int = Field(112, ge=8)
    """Side of the images that will be tokenized, in pixels; quality is measured at this size."""
    image_size: int = Field(112, ge=8)
    """Side of the training crops; less than ``view_size`` trains on parts of views, which is cheaper."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Side of the square that becomes a view, as a share of the image's shorter side: drawn log-uniformly."""
    seed: int = Field(0, ge=0, lt=2**63)
    batch: int = Field(64, ge=1)
    """Images of one optimizer step over all ranks."""
    micro_batch: int = Field(64, ge=1)
    """Most images that a rank runs at once; accumulation follows from it."""
    steps: int = Field(20_000, ge=1)
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(1e-5, ge=0)
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises from 0."""
    lr_steps: int | None = Field(None, ge=1)
    """Steps of the cosine from ``lr`` to ``min_lr``; by default ``steps``."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    """Of convolution weights; biases have none."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global L2 norm of the gradient; 0 never clips."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights that are measured and written; 0 takes the last weights."""
    temperature: tuple[float, float] = (1.0, 1 / 16)
    """Gumbel-softmax temperature at the start and at the end of its cosine."""
    temperature_steps: int | None = Field(None, ge=1)
    """Steps of that cosine; by default three quarters of ``steps``."""
    kl_weight: float = Field(6.6, ge=0)
    """Final weight of the KL term, in the paper's units: the loss is divided by the number of pixel values."""
    kl_warmup_steps: int | None = Field(None, ge=1)
    """Steps of the KL weight's cosine from 0; by default a quarter of ``steps``."""
    usage_weight: float = Field(0.0, ge=0)
    """Weight, in the same units, of the KL of the batch's average token distribution alone: keeps the codebook
    in use in short trainings on little data. 0 in the paper."""
    precision: Precision = "auto"
    """Of the convolutions. ``auto`` is what ``--ds_config`` says or, where that says ``"auto"`` or there is none,
    what the checkpoint has or, in a new run, what all ranks' devices are fast in. Without ``--ds_config`` weights
    are fp32; fp16 needs one, for its scaler."""
    held_out: int = Field(64, ge=1)
    """Images kept aside to measure reconstruction and codebook use."""
    measure_every_steps: int | None = Field(None, ge=1)
    """Steps between such measurements, each with a picture; by default a tenth of ``steps``. There is one at the
    end too."""
    collapse: CollapseConfig = CollapseConfig()
    workers: int = Field(2, ge=1)
    """Threads of each rank that decode and crop images."""
    cache_gib: float = Field(2.0, ge=0)
    """Memory of each rank for decoded images; what does not fit is decoded each time it is used."""
    max_skipped_in_a_row: int = Field(20, ge=1)
    """Steps skipped one after another for non-finite gradients before the run stops."""
    max_minutes: float | None = Field(None, gt=0)
    """Stop by itself so long after a start, as a stop signal would: with a checkpoint, to be started again."""
    preflight: bool = True
    """Check memory and the ranks' connection before anything is allocated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    storage: StorageConfig = StorageConfig()
    logging: LoggingConfig = LoggingConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()

    @model_validator(mode="after")
    def _check(self) -> TokenizerRecipe:
        if not self.model.decoder_input:
            raise ConfigError("model.decoder_input", 0, "1 or more: a dVAE is trained with its decoder")
        check_place("run", self.run or "")
        for field, size in (("image_size", self.image_size), ("view_size", self.view_size)):
            if size % 8:
                raise ConfigError(field, size, "a multiple of 8, the encoder's stride")
        if self.image_size > self.view_size:
            raise ConfigError("image_size", self.image_size, f"at most view_size ({self.view_size})")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError("crop_scale", self.crop_scale, "smallest and largest share, above 0 and up to 1")
        if not 0 < self.temperature[1] <= self.temperature[0]:
            raise ConfigError("temperature", self.temperature, "start and end, falling and above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas", self.betas, "two numbers in [0, 1)")
        if self.min_lr > self.lr:
            raise ConfigError("min_lr", self.min_lr, f"at most lr ({self.lr})")
        return self

    @property
    def measured_every(self) -> int:
        """``measure_every_steps``, or a tenth of the steps."""
        return self.measure_every_steps or max(1, self.steps // 10)

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
        """Steps in which the codebook's use is not judged."""
        given = self.collapse.after_steps
        return self.kl_rise if given is None else given

    @property
    def collapse_patience(self) -> int:
        """Steps in a row with too little use after which the training stops."""
        return self.collapse.for_steps or min(_MOST_PATIENCE, max(_LEAST_PATIENCE, self.steps // 20))

    @property
    def least_perplexity(self) -> float:
        """Perplexity below which the codebook counts as collapsed."""
        return max(2.0, (self.collapse.below or _COLLAPSED) * self.model.vocabulary)
