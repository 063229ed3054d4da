"""What a tokenizing job is: everything that decides the bytes of its shards, recorded once in ``job.json``.

The first worker records it; every other worker, restart and the finish compare theirs with it, so that shards
of two different jobs never come together in one data set.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from beit_dist.errors import ConfigError, DataError, StorageError
from beit_dist.images.decoding import CROP_AREA, Augment
from beit_dist.images.heif import heif_version
from beit_dist.shards.sample import MAX_VIEWS, SampleLayout
from beit_dist.storage.place import Place

JOB_NAME = "job.json"
TOKEN_STRIDE = 8
"""Pixels of the tokenizer's view for each visual token: the dVAE's downsampling."""

_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 0.0)  # seconds between looks at a job that is being written

SOFTWARE = ("torch", "pillow", "numpy", "decoder")
"""Fields of a job that are versions of what computes its bytes."""

PixelVersion = Literal[1, 2]
PIXEL_VERSIONS: tuple[PixelVersion, ...] = (1, 2)
_SINCE: dict[str, Any] = {"pixel_version": 1, "decoder": "pillow", "compiled": False, "crop_area": CROP_AREA[0]}
"""Fields that jobs did not always have, with what every job did before. Where that holds they are not written, so
that such a job has the content and the digest that it always had."""

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Job:
    """The settings that decide the bytes.

    Args:
        images: sha256 of ``sources.jsonl``.
        tokenizer: digest of the tokenizer.
        batch: images of one encoder batch; its fixed shape keeps tokens independent of the workers.
        device: ``cpu`` or ``cuda``: they round differently, so near-ties give other tokens.
        torch: version of PyTorch, which computes the tokens.
        pillow: version of Pillow, which decodes, jitters and resizes; and of pillow-heif, if it is installed.
        numpy: version of NumPy.
        pixel_version: how views are made: 1 by Pillow as in all data sets before there was a 2, or 2 as in
            :mod:`beit_dist.images.fast_views`.
        decoder: of JPEGs: ``pillow``, or ``simplejpeg`` with its version.
        compiled: whether the tokenizer is compiled, which rounds differently.
        crop_area: smallest share of an image's area that a random crop takes.

    Raises:
        ConfigError: a number is out of range.
    """

    images: str
    tokenizer: str
    vocabulary: int
    image_size: int
    patch_size: int
    views: int
    shard_samples: int
    seed: int
    augment: Augment
    batch: int
    precision: Precision
    device: str
    torch: str
    pillow: str
    numpy: str
    pixel_version: PixelVersion = 1
    decoder: str = "pillow"
    compiled: bool = False
    crop_area: float = CROP_AREA[0]

    def __post_init__(self) -> None:
        SampleLayout(self.image_size, self.patch_size, self.vocabulary)
        if not 1 <= self.views <= MAX_VIEWS:
            raise ConfigError("--views", self.views, f"1 to {MAX_VIEWS}")
        if self.views > 1 and self.augment == "center":
            raise ConfigError("--views", self.views, "1, since every view is the same with --augment center")
        for name in ("shard_samples", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}", getattr(self, name), "1 or more")
        if self.pixel_version not in PIXEL_VERSIONS:
            raise ConfigError("--pixel-version", self.pixel_version, "1 or 2")
        if not 0 < self.crop_area <= 1:
            raise ConfigError("--crop-area", self.crop_area, "a share above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("--seed", self.seed, "0 to 2**63 - 1")

    @property
    def layout(self) -> SampleLayout:
        return SampleLayout(self.image_size, self.patch_size, self.vocabulary)

    @property
    def token_size(self) -> int:
        """Side of the tokenizer's view in pixels: its token grid is the patch grid."""
        return TOKEN_STRIDE * self.layout.grid

    @property
    def digest(self) -> str:
        """sha256 of the settings; every commit carries it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The canonical content of ``job.json``."""
        written = {name: value for name, value in asdict(self).items() if _SINCE.get(name, self) != value}
        return (json.dumps(written, indent=1) + "\n").encode()

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """What ``settings`` says differently, as ``name: got ..., expected ...`` with this job as expected."""
        ours = asdict(self)
        return [
            f"{name}: got {value!r}, expected {ours[name]!r}"
            for name, value in settings.items()
            if name in ours and value is not None and value != ours[name]
        ]


def software() -> dict[str, str]:
    """The versions of this process, as a job has them."""
    import numpy
    import PIL
    import torch

    heif = heif_version()
    pillow = f"{PIL.__version__} with pillow-heif {heif}" if heif else PIL.__version__
    return {"torch": str(torch.__version__), "pillow": pillow, "numpy": numpy.__version__}


def record_job(out: Place, job: Job) -> None:
    """Record the job in the data set's folder, or check that it is the one recorded there.

    Raises:
        DataError: the folder belongs to another job.
    """
    out.make()
    if not out.create(JOB_NAME, job.to_bytes()) or not out.is_local:
        # In a store whose check is not one with its write, another job may have written after us.
        check_same_job(out, read_job(out), asdict(job))


def check_same_job(out: Place, recorded: Job, settings: Mapping[str, Any]) -> None:
    """Refuse settings (None: not given) that differ from the recorded job's.

    Raises:
        DataError: names each difference.
    """
    differences = recorded.differences({name: value for name, value in settings.items() if name not in SOFTWARE})
    software = recorded.differences({name: settings.get(name) for name in SOFTWARE})
    if software and not differences:
        raise DataError(
            f"{out}: its job was begun with other software: {'; '.join(software)}. Their shards would "
            "differ: run all workers in one environment, or start over in another --out"
        )
    if differences:
        raise DataError(
            f"{out}: belongs to another job: {'; '.join(differences)}. Give the settings in {out / JOB_NAME}, "
            "or start over in another --out"
        )


def read_job(out: Place) -> Job:
    """The job recorded in the data set's folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = out / JOB_NAME
    try:
        settings = json.loads(_read_when_written(out))
        missing = {field.name for field in fields(Job)} ^ set(_SINCE | settings)
        if missing:
            raise ValueError(f"wrong fields {sorted(missing)}")
        return Job(**settings)
    except FileNotFoundError:
        raise DataError(f"{path}: not found, so no worker has started here yet") from None
    except StorageError:
        raise
    except (OSError, ValueError, TypeError, RecursionError, ConfigError) as error:
        raise DataError(f"{path}: not a job of this version of beit shards ({error})") from None


def _read_when_written(out: Place) -> bytes:
    """``job.json``; where files have their names before their content, another worker may just be writing it.

    Raises:
        FileNotFoundError: there is none.
        DataError: its worker died while it wrote it.
    """
    for pause in _PAUSES:
        content = out.read(JOB_NAME)
        if content.rstrip().endswith(b"}"):
            return content
        time.sleep(pause)
    raise DataError(
        f"{out / JOB_NAME}: got {len(content)} bytes, cut short because its worker died while writing it. "
        "Remove it, and run the same command again"
    )
