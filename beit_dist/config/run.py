"""The settings that every kind of training has."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.config.reading import Section, is_recorded
from beit_dist.config.storage import StorageConfig
from beit_dist.errors import ConfigError
from beit_dist.storage.opening import check_place

_MEASURED_EVERY = 1000
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class CheckpointConfig(Section):
    """When to save a checkpoint, and which ones to keep."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; null saves by time alone."""
    every_minutes: float | None = Field(15.0, gt=0)
    """Minutes between checkpoints; null saves by steps alone."""
    keep: int = Field(3, ge=1)
    """How many of the newest checkpoints to keep."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Checkpoints at multiples of this number of steps are never deleted."""
    keep_every_hours: float | None = Field(None, gt=0)
    """The first checkpoint, and then one every this many hours, is never deleted."""
    max_failed_saves: int = Field(3, ge=1)
    """How many saves in a row may fail before the run stops."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long rank 0 waits for the files of the other ranks before a save counts as failed, in seconds."""


class EMAConfig(Section):
    """An exponential moving average of the weights, kept beside the trained weights."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Share of the average that is kept at each update, such as 0.9998. Null keeps no average."""


class ValidationConfig(Section):
    """Measurements on held-out data, which is never trained on."""

    data: str | tuple[str, ...] | None = None
    """Held-out data, of the same kind as ``data``. Null measures nothing in pre-training; a tokenizer's training
    then holds out ``held_out`` of its images."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between measurements; there is always one after the last step. Null means a tenth of the run, but at
    most 1,000."""
    samples: int = Field(2048, ge=1)
    """How many samples of ``validation.data`` to measure. They are the same ones every time."""


class LoggingConfig(Section):
    """Progress, metrics, TensorBoard and Weights & Biases."""

    every_steps: int = Field(10, ge=1)
    """Steps between two fetches of the numbers from the device. Fetching makes the device wait."""
    metrics_port: int | None = Field(9400, ge=0, le=65535)
    """Port of the Prometheus endpoint on rank 0. 0 takes any free port, null turns the endpoint off."""
    metrics_address: str = "127.0.0.1"
    """Address on which the Prometheus endpoint listens. By default only programs on rank 0's host can read it;
    with ``0.0.0.0`` the whole network can."""
    progress: bool = True
    """Print progress lines."""
    tensorboard: bool = False
    """Write event files to ``RUN/tensorboard``. Needs ``pip install 'beit_dist[tensorboard]'``."""
    wandb: Literal["online", "offline"] | None = None
    """``online``: send the numbers to Weights & Biases. ``offline``: write its files to ``RUN/wandb``. Needs
    ``pip install 'beit_dist[wandb]'``."""
    wandb_project: str = "beit_dist"
    """Project of the Weights & Biases run."""


class ProfileConfig(Section):
    """A trace of a few steps, recorded with torch's profiler."""

    start_step: int | None = Field(None, ge=1)
    """First step to record; null records nothing. The first steps after a start are slower than the rest."""
    steps: int = Field(3, ge=1)
    """How many steps to record."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that record a trace."""


class GuardConfig(Section):
    """Checks of a running training. Gradients that are not finite are never applied, whatever these settings
    say."""

    spikes: Literal["off", "warn", "stop"] = "warn"
    """What to do when a loss lies far above the ones before it."""
    window: int = Field(100, ge=8)
    """How many earlier losses a loss is compared with. No loss is judged before there are this many."""
    threshold: float = Field(12.0, gt=0)
    """A loss is a spike if it lies this many robust standard deviations (1.4826 · median absolute deviation) above
    the median of the window."""
    check_parameters_every_steps: int | None = Field(None, ge=1)
    """Steps between two comparisons of the weights on all ranks. A comparison waits for the device. Not available
    at ZeRO stage 3."""

    @field_validator("spikes", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a plain off as false


class WatchdogConfig(Section):
    """When a rank counts as hanging."""

    stall_seconds: float = Field(600.0, gt=0)
    """A rank that completes no step for this many seconds writes its stacks to ``RUN/ranks``."""
    start_seconds: float | None = Field(None, gt=0)
    """The same limit for the time until the first step has ended; null does not watch the start."""


class TimeoutsConfig(Section):
    """How long a rank waits for another rank before it gives up."""

    start_minutes: float = Field(30.0, gt=0)
    """Limit in minutes until the first step has ended."""
    step_minutes: float = Field(15.0, gt=0)
    """Limit in minutes from then on. Must exceed ``loader.timeout_seconds``, the time a rank may wait for its
    data."""

    def check_loader(self, seconds: float) -> None:
        """Refuse a limit that a rank may spend waiting for its data.

        Args:
            seconds: ``loader.timeout_seconds``.

        Raises:
            ConfigError: it is too short.
        """
        if 60 * self.step_minutes <= seconds:
            raise ConfigError(
                "timeouts.step_minutes",
                self.step_minutes,
                f"more than loader.timeout_seconds ({seconds:g})",
                "A rank may wait that long for its data while the others wait for the rank.",
            )


class RunConfig(Section):
    """The settings of every training. Each kind adds its own."""

    of_the_host: ClassVar[frozenset[str]] = frozenset(
        {
            *("run", "data", "init_from", "validation", "checkpoint", "storage", "logging", "profile", "watchdog"),
            *("timeouts", "preflight", "max_minutes", "max_fruitless_starts"),
        }
    )
    """Settings that do not affect what is learnt. The values of some may hold a password."""

    run: str
    """The run folder or its URL: checkpoints, metrics, markers. A run found there is resumed."""
    data: str | tuple[str, ...] | None = None
    """What to train on: the folder or URL of shards in pre-training, one or more sources of images for a
    tokenizer."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random: the initial weights, the order of samples, masks, crops and noise."""
    precision: Precision = "auto"
    """What the model computes in. Master weights and moments are always fp32. ``auto`` follows the DeepSpeed JSON;
    if that says ``"auto"`` too, a resumed run keeps the precision of its checkpoint and a new run measures which
    precision its devices compute fast. At ZeRO stage 0, ``auto`` is fp32."""
    global_batch: int = Field(2048, ge=1)
    """Samples in one optimizer step, over all ranks."""
    micro_batch: int = Field(128, ge=1)
    """Largest number of samples that a rank processes at once. Gradient accumulation follows from it."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; fractions are allowed."""
    steps: int | None = Field(None, ge=1)
    """Number of optimizer steps. In pre-training it replaces ``epochs``."""
    optimizer: OptimizerConfig = OptimizerConfig()
    init_from: str | None = None
    """Where a new run takes its first weights from: a run, a step folder or the URL of either, a tokenizer file,
    or a model of Hugging Face, timm or unilm (``docs/weights.md``). The optimizer and the position in the data
    start afresh."""
    ema: EMAConfig = EMAConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    storage: StorageConfig = StorageConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    compile: bool = False
    """Compile each block with torch.compile at its first call. Results differ by rounding. Not available at ZeRO
    stage 3."""
    deterministic: bool = False
    """Use deterministic algorithms on CUDA, which are slower. A CPU is deterministic anyway."""
    max_skipped_in_a_row: int = Field(20, ge=1)
    """How many steps in a row may be skipped for gradients that are not finite before the run stops."""
    preflight: bool = True
    """Check memory and the connection between ranks before anything is allocated."""
    max_minutes: float | None = Field(None, gt=0)
    """Stop this many minutes after the start and save a checkpoint, as after a stop signal. For queues with a time
    limit."""
    max_fruitless_starts: int | None = Field(5, ge=1)
    """How many starts in a row may make no checkpoint before the next one is refused. The refusal ends a job that
    a scheduler would otherwise start again and again. Null: any number. A start that is stopped after a step makes
    a checkpoint."""

    @model_validator(mode="after")
    def _check_places(self, info: ValidationInfo) -> RunConfig:
        places = {"run": self.run, "data": self.data, "validation.data": self.validation.data}
        places["init_from"] = self.init_from
        for field, named in places.items() if not is_recorded(info) else ():
            for place in [named] if isinstance(named, str) else named or ():
                check_place(field, place, written=field == "run")
        return self

    @property
    def default_warmup(self) -> int:
        """Steps of the warm-up if ``optimizer`` sets none."""
        return 0

    def check_engine(self, stage: int, precision: str) -> None:
        """Refuse settings that the engine rules out.

        Args:
            stage: of ZeRO.
            precision: by name, or ``auto``, which is settled later.

        Raises:
            ConfigError: it does.
        """
        if self.compile and stage == 3:
            raise ConfigError(
                "compile",
                True,
                "false at ZeRO stage 3, where gathering the weights breaks the graph of a block",
                "Use stage 1 or 2.",
            )

    def measured_every(self, steps: int) -> int:
        """Steps between measurements on held-out data.

        Args:
            steps: of the whole run.
        """
        return self.validation.every_steps or max(1, min(_MEASURED_EVERY, steps // 10))
