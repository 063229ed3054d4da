"""Every setting, typed and validated: a YAML recipe, then ``key=value`` overrides.

A recipe is refused at start when a key is unknown, a type is wrong or settings contradict each other; the
message names the field, what it got, what it expected and the way out. What the DeepSpeed JSON sets (ZeRO
stage, accumulation type) is not repeated here: see ``beit_dist/engine/resolve.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from beit_dist.errors import ConfigError
from beit_dist.settings import Section as Section
from beit_dist.settings import load_recipe as load_recipe
from beit_dist.settings import near_divisors as near_divisors
from beit_dist.settings import validate as validate
from beit_dist.storage.access import Access
from beit_dist.storage.place import check_place, is_url

Unit = tuple[float, float, float]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

HALF: Unit = (0.5, 0.5, 0.5)
"""Mean and deviation of the released 22k models (unilm ``IMAGENET_INCEPTION_MEAN``)."""
IMAGENET_MEAN: Unit = (0.485, 0.456, 0.406)
IMAGENET_STD: Unit = (0.229, 0.224, 0.225)

_SECRET = re.compile(
    r"secret|passw|token|credential|auth|cookie|access_key|account_key|customer_?key|^key$|sas|connection_string",
    re.IGNORECASE,
)
"""Names of options that hold credentials."""
_USER_IN_URL = re.compile(r"://[^/?#\s]*@")

_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
}


class ModelConfig(Section):
    """The BEiT v1 backbone and head (arXiv 2106.08254; the released code's settings are the defaults)."""

    size: Literal["tiny", "small", "base", "large"] = "base"
    """Fills in width, depth and heads where they are not given."""
    width: int = Field(0, ge=0)
    depth: int = Field(0, ge=0)
    heads: int = Field(0, ge=0)
    mlp_ratio: float = Field(4.0, gt=0)
    image_size: int = Field(224, gt=0)
    """Side of the square image in pixels."""
    patch_size: int = Field(16, gt=0)
    """Side of a patch in pixels."""
    vocabulary: int = Field(8192, ge=2, le=32768)
    """Number of visual tokens; they are stored as int16."""
    absolute_positions: bool = False
    """Learned absolute position embeddings (the paper's IN-1k models)."""
    relative_positions: bool = True
    """One relative position bias table shared by all blocks (the released code's default)."""
    layer_scale: float = Field(0.1, ge=0)
    """Initial LayerScale; 0 leaves it out. 0.1 for base, 1e-5 for large in the released code."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the last block; rises linearly from 0 at the first."""
    pixel_mean: Unit = HALF
    """Mean of the normalisation, in units of 0..1, by channel."""
    pixel_std: Unit = HALF

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for name, number in _SIZES.get(filled.get("size", "base"), {}).items():
            if not filled.get(name):
                filled[name] = number
        return filled

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.image_size % self.patch_size:
            raise ConfigError(
                "model.patch_size", self.patch_size, f"a divisor of model.image_size ({self.image_size})"
            )
        if self.width % self.heads:
            raise ConfigError("model.heads", self.heads, f"a divisor of model.width ({self.width})")
        if not all(deviation > 0 for deviation in self.pixel_std):
            raise ConfigError("model.pixel_std", self.pixel_std, "three numbers above 0")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side of the image; equal to the side of the visual-token grid."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    @property
    def patch_bytes(self) -> int:
        """uint8 values of a patch: ``patch_size² · 3``."""
        return 3 * self.patch_size**2

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Stochastic-depth rate of each block (unilm: ``linspace(0, drop_path, depth)``)."""
        last = max(1, self.depth - 1)
        return tuple(self.drop_path * block / last for block in range(self.depth))


class MaskingConfig(Section):
    """Blockwise masking; the algorithms are in ``beit_dist/data/masking.py``."""

    mode: Literal["exact", "original", "paper"] = "exact"
    """``paper``: Algorithm 1, blocks until more than ``ratio`` is masked; ``original``: the released code's
    generator, at most ``masked_patches``; ``exact``: the same, topped up to exactly ``masked_patches``."""
    masked_patches: int = Field(0, ge=0)
    """Budget of ``exact`` and ``original``; 0 means ceil(ratio · patches)."""
    ratio: float = Field(0.4, gt=0, lt=1)
    min_block: int = Field(16, ge=1)
    """Smallest target area of a block, in patches."""

    def budget(self, patches: int) -> int:
        """Patches to mask out of ``patches``."""
        return self.masked_patches or math.ceil(self.ratio * patches)


class OptimizerConfig(Section):
    """AdamW, the learning-rate schedule and clipping."""

    lr: float = Field(1.5e-3, gt=0)
    """Peak learning rate; absolute, not scaled by the batch."""
    min_lr: float = Field(1e-5, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float = Field(3.0, ge=0)
    """Largest global L2 norm of the gradient; 0 never clips."""
    warmup_epochs: float | None = Field(None, ge=0)
    warmup_steps: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ConfigError(
                "optimizer.warmup_steps",
                self.warmup_steps,
                f"only one of warmup_epochs ({self.warmup_epochs:g}) and warmup_steps",
                "Set the one that the recipe should not have to null, as in optimizer.warmup_epochs=null",
            )
        if self.min_lr > self.lr:
            raise ConfigError("optimizer.min_lr", self.min_lr, f"at most optimizer.lr ({self.lr})")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optimizer.betas", self.betas, "two numbers in [0, 1)")
        return self


class LoaderConfig(Section):
    """Order of samples and the processes that read them; see ``docs/data.md``."""

    workers: int = Field(2, ge=0)
    """Reading processes of each rank; 0 reads in a thread of the rank."""
    prefetch: int = Field(2, ge=1)
    """Steps that the workers read ahead."""
    lanes: int | None = Field(None, ge=1)
    """Independent streams the data is cut into; by default the largest divisor of global_batch up to an
    eighth of it."""
    block_samples: int | None = Field(None, ge=1)
    """Consecutive samples of a shard read together; by default min(64, samples // (16 · lanes))."""
    window_blocks: int = Field(1, ge=1)
    """Blocks whose samples are shuffled together."""
    memory_gib: float = Field(4.0, gt=0)
    """What each rank may hold of blocks that are fetched ahead where ``data`` is a URL; above it, single samples
    are fetched, which is slower. ``--dry-run`` tells the need."""
    cache_dir: str | None = None
    """Folder on a local disk, shared by the ranks of a host, in which blocks fetched from a URL are kept."""
    cache_gib: float = Field(100.0, gt=0)
    """How much is kept there; what was not used for longest goes first."""
    bad_samples: int = Field(0, ge=0)
    """How many damaged samples a run may train around, each with loss weight 0."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long the trainer waits for a batch before it gives up."""

    @model_validator(mode="after")
    def _check(self) -> LoaderConfig:
        if self.cache_dir is not None and is_url(self.cache_dir):
            raise ConfigError("loader.cache_dir", self.cache_dir, "a folder on a local disk")
        return self


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: int | None = Field(None, ge=1)
    every_minutes: float | None = Field(15.0, gt=0)
    keep: int = Field(3, ge=1)
    """Newest checkpoints kept."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Checkpoints at multiples of this stay for good."""
    keep_every_hours: float | None = Field(None, gt=0)
    """The first checkpoint, and then one every so many hours, stay for good."""
    max_failed_saves: int = Field(3, ge=1)
    """Saves in a row that may fail before the run stops."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long rank 0 waits for the other ranks' files before a save counts as failed."""


class StorageConfig(Section):
    """How what lies at URLs is reached. Credentials come from the environment, never from here."""

    retry_seconds: float = Field(120.0, ge=0)
    """How long a request that fails is tried again."""
    connect_seconds: float = Field(10.0, gt=0)
    read_seconds: float = Field(30.0, gt=0)
    """How long a store may take until the next bytes of an answer."""
    connections: int = Field(32, ge=1)
    """Of one process to one store, at most."""
    s3_reader: Literal["s3fs", "obstore"] = "s3fs"
    """What reads ranges of objects in S3. obstore is a package of its own and takes less of the processor."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """For fsspec, by protocol: ``{s3: {endpoint_url: "https://..."}}``."""

    @model_validator(mode="after")
    def _check(self) -> StorageConfig:
        for name, value in _entries(self.options, "storage.options"):
            if _SECRET.search(name.rpartition(".")[2]) or (isinstance(value, str) and _USER_IN_URL.search(value)):
                raise ConfigError(
                    name,
                    "a credential",
                    "none in a recipe, of which every checkpoint has a copy",
                    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, in the environment.",
                )
        return self

    @property
    def access(self) -> Access:
        """The settings as the storage layer takes them."""
        return Access(
            retry_seconds=self.retry_seconds,
            connect_seconds=self.connect_seconds,
            read_seconds=self.read_seconds,
            connections=self.connections,
            options=self.options,
            s3_reader=self.s3_reader,
        )


def _entries(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The dotted names and the values of all keys in nested mappings and lists."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield f"{path}.{key}", value
        yield from _entries(value, f"{path}.{key}")


class EMAConfig(Section):
    """An exponential moving average of the weights, beside those that are trained."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Share of the average that stays at each update, 0.9998 for instance; null keeps no average."""


class ValidationConfig(Section):
    """Loss on samples that are not trained on."""

    data: str | None = None
    """Folder or URL of shards of held-out images, made with the same tokenizer; null measures nothing."""
    every_steps: int = Field(1000, ge=1)
    """Steps between measurements; there is one after the last step too."""
    samples: int = Field(2048, ge=1)
    """How many samples are measured: always the same ones, with the same masks."""


class LoggingConfig(Section):
    """Progress, metrics and their endpoint."""

    every_steps: int = Field(10, ge=1)
    """Steps between fetches of the numbers kept on the device."""
    metrics_port: int | None = Field(9400, ge=0, le=65535)
    """Port of the Prometheus endpoint on rank 0; 0 takes any free one, null turns it off."""
    metrics_address: str = "0.0.0.0"
    progress: bool = True
    tensorboard: bool = False
    """Also write event files to RUN/tensorboard; needs the package."""
    wandb: Literal["online", "offline"] | None = None
    """Also send the numbers to Weights & Biases, or write its files to RUN/wandb only; needs the package."""
    wandb_project: str = "beit_dist"


class ProfileConfig(Section):
    """A trace of a few steps by torch's profiler."""

    start_step: int | None = Field(None, ge=1)
    """First step recorded; null records none. The first steps of a start are slower than the rest."""
    steps: int = Field(3, ge=1)
    ranks: tuple[int, ...] = (0,)
    """Ranks that record."""


class GuardConfig(Section):
    """What is watched besides gradients that are not finite; see ``beit_dist/engine/guard.py``."""

    spikes: Literal["off", "warn", "stop"] = "warn"
    """What to do about a loss far above the ones before it."""
    window: int = Field(100, ge=8)
    """Losses that a loss is compared with; until there are so many, none is judged."""
    threshold: float = Field(12.0, gt=0)
    """A spike is so many robust standard deviations (1.4826 · median absolute deviation) above the median."""
    check_parameters_every_steps: int | None = Field(None, ge=1)
    """Compare all ranks' weights so often, by a digest; waits for the device. Not at ZeRO stage 3."""

    @field_validator("spikes", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a plain off as false


class WatchdogConfig(Section):
    """When a rank is taken to hang; see ``beit_dist/engine/watchdog.py``."""

    stall_seconds: float = Field(600.0, gt=0)
    """Without the end of a step for so long, a rank writes its stacks to ``RUN/ranks``."""
    start_seconds: float | None = Field(None, gt=0)
    """The same before the first step; by default the start is not watched."""


class TimeoutsConfig(Section):
    """How long a rank waits for another in a collective before it gives up."""

    start_minutes: float = Field(30.0, gt=0)
    """Until the first step has ended."""
    step_minutes: float = Field(15.0, gt=0)
    """From then on; more than ``loader.timeout_seconds``, which a rank may wait for its data."""


class TrainConfig(Section):
    """A pre-training recipe."""

    run: str
    """The run folder, or its URL: checkpoints, metrics, markers. A run found there is resumed."""
    data: str | None = None
    """Folder or URL of the shards written by ``tools/shard_tokens.py``."""
    tokenizer: str | None = None
    """The tokenizer's file, if its digest shall be compared with the one the shards were made with."""
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Precision = "auto"
    """What the model computes in; master weights and moments are fp32 either way. ``auto`` is what the JSON of
    ``--ds_config`` says or, where that says ``"auto"``, what the checkpoint has or, in a new run, what all ranks'
    devices are fast in; at ZeRO stage 0 it is fp32."""
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    global_batch: int = Field(2048, ge=1)
    """Samples of one optimizer step over all ranks."""
    micro_batch: int = Field(128, ge=1)
    """Largest number of samples a rank runs at once; accumulation follows from it."""
    epochs: float = Field(800, gt=0)
    steps: int | None = Field(None, ge=1)
    """Number of optimizer steps, in place of ``epochs``."""
    optimizer: OptimizerConfig = OptimizerConfig()
    init_from: str | None = None
    """Run or step folder, or URL, whose weights a new run starts from, without its optimizer and position; or a
    folder or file of Hugging Face, timm or unilm (``docs/weights.md``)."""
    ema: EMAConfig = EMAConfig()
    validation: ValidationConfig = ValidationConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    storage: StorageConfig = StorageConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again: less memory, a third
    more work, the same gradients."""
    compile: bool = False
    """Compile each block with torch.compile at its first call. Rounding differs; not at ZeRO stage 3."""
    deterministic: bool = False
    """Deterministic algorithms on CUDA (slower); the CPU is deterministic either way."""
    max_skipped_in_a_row: int = Field(20, ge=1)
    """Steps skipped one after another for non-finite gradients before the run stops."""
    preflight: bool = True
    """Check memory and the ranks' connection before anything is allocated; see ``engine/preflight.py``."""
    max_minutes: float | None = Field(None, gt=0)
    """Stop by itself so long after a start, as a stop signal would: with a checkpoint, to be started again."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        for field in ("run", "data", "init_from"):
            check_place(field, getattr(self, field) or "")
        check_place("validation.data", self.validation.data or "")
        patches, masking = self.model.patches, self.masking
        budget = masking.budget(patches)
        if budget >= patches:
            raise ConfigError("masking.masked_patches", budget, f"fewer than the {patches} patches of an image")
        if masking.min_block > budget:
            raise ConfigError(
                "masking.min_block",
                masking.min_block,
                f"at most the {budget} masked patches",
                f"Lower masking.min_block, or raise masking.masked_patches above {masking.min_block}.",
            )
        if round(math.sqrt(masking.min_block)) >= self.model.grid:
            raise ConfigError(
                "masking.min_block",
                masking.min_block,
                f"a block narrower than the {self.model.grid}×{self.model.grid} grid",
            )
        if 60 * self.timeouts.step_minutes <= self.loader.timeout_seconds:
            raise ConfigError(
                "timeouts.step_minutes",
                self.timeouts.step_minutes,
                f"more than loader.timeout_seconds ({self.loader.timeout_seconds:g})",
                "A rank may wait so long for its data while the others wait for it.",
            )
        lanes = self.loader.lanes
        if lanes is not None and self.global_batch % lanes:
            raise ConfigError(
                "loader.lanes",
                lanes,
                f"a divisor of global_batch ({self.global_batch})",
                f"Near by: {near_divisors(self.global_batch, lanes)}.",
            )
        return self

    @property
    def lanes(self) -> int:
        """``loader.lanes``, or the largest divisor of the global batch up to an eighth of it."""
        if self.loader.lanes is not None:
            return self.loader.lanes
        most = max(1, self.global_batch // 8)
        return next(lanes for lanes in range(most, 0, -1) if self.global_batch % lanes == 0)


class DVAEConfig(Section):
    """The DALL-E discrete VAE (arXiv 2102.12092; the published encoder's sizes are the defaults)."""

    vocabulary: int = Field(8192, ge=2, le=32768)
    hidden: int = Field(256, ge=4)
    """Channels of the first group; the later three have 2, 4 and 8 times as many."""
    blocks_per_group: int = Field(2, ge=1)
    decoder_input: int = Field(128, ge=0)
    """Channels the decoder's first convolution makes of the one-hot tokens: the codebook's width. 0: no decoder,
    which makes tokens but no pictures of them."""

    @model_validator(mode="after")
    def _check(self) -> DVAEConfig:
        if self.hidden % 4:
            raise ConfigError("model.hidden", self.hidden, "a multiple of 4 (residual paths are a quarter wide)")
        return self
