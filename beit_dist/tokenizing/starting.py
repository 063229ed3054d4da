"""How a worker starts: its options, what they come to before any image is listed, and its work."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from beit_dist.engine.device import device_of
from beit_dist.errors import ConfigError
from beit_dist.images.decoding import CROP_AREA, Augment
from beit_dist.images.jpeg_decoders import Decoder, decoder_version
from beit_dist.models.dvae import DVAE
from beit_dist.shards.manifest import Manifest
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place
from beit_dist.tokenizing.decoding import CHUNK
from beit_dist.tokenizing.encoder import DVAEEncoder, check_compiles, compiles_by_default
from beit_dist.tokenizing.finish import finished
from beit_dist.tokenizing.job import JOB_NAME, SOFTWARE, Job, PixelVersion, Precision, read_job, software
from beit_dist.tokenizing.metrics import Exporter, Metrics
from beit_dist.tokenizing.parts import Part, check_held_out
from beit_dist.tokenizing.rejected import rejection_limit
from beit_dist.tokenizing.tokenizer_file import tokenizer_at
from beit_dist.tokenizing.worker import Worker, WorkerReport
from beit_dist.tokenizing.worker_index import worker_index
from beit_dist.weights.tokenizer_files import load_tokenizer

MAX_DECODERS = 16


@dataclass(frozen=True)
class Options:
    """What the user asked for; see ``beit shards --help`` for each. None: to be found out."""

    images: tuple[str, ...]
    out: Place
    tokenizer: str
    views: int
    image_size: int
    patch_size: int
    shard_samples: int
    seed: int
    augment: Augment
    batch: int
    precision: Precision
    device: str
    decoders: int | None
    index: int | None
    count: int | None
    max_rejected: str
    finish: bool
    access: Access
    metrics_port: int | None
    metrics_address: str
    metrics_textfile: Path | None
    sniff: bool = False
    held_out: str | None = None
    pixel_version: PixelVersion = 1
    decoder: Decoder = "pillow"
    compiled: bool | None = None
    encoders: int = 1
    crop_area: float = CROP_AREA[0]


@dataclass(frozen=True)
class Prepared:
    """What is known before any image is listed."""

    index: int
    count: int
    device: torch.device
    model: DVAE
    job: Job
    """Without the list's digest."""
    manifest: Manifest | None
    """Of a job that is complete."""


def prepare(options: Options, environment: Mapping[str, str]) -> Prepared:
    """Check the settings, load the tokenizer and look at the folder; nothing is written.

    Raises:
        UserError: a setting, the tokenizer or the folder cannot be used.
    """
    index, count = worker_index(options.index, options.count, environment)
    device = device_of(options.device)
    rejection_limit(options.max_rejected, 0)
    check_held_out(options.held_out)
    if options.decoders is not None and options.decoders < 0:
        raise ConfigError("--decoders", options.decoders, "0 or more")
    if options.encoders < 1:
        raise ConfigError("--encoders", options.encoders, "1 or more")
    _exporter(options, Metrics(index))  # which refuses what cannot be
    decoder = decoder_version(options.decoder)
    if options.pixel_version == 2:
        from beit_dist.images.fast_views import check_resizing  # it starts PyTorch's kernels

        check_resizing()
    with tokenizer_at(options.tokenizer, options.access) as path:
        model = load_tokenizer(path)
    job = Job(
        images="",
        tokenizer=model.digest,
        vocabulary=model.config.vocabulary,
        image_size=options.image_size,
        patch_size=options.patch_size,
        views=options.views,
        shard_samples=options.shard_samples,
        seed=options.seed,
        augment=options.augment,
        batch=options.batch,
        precision=options.precision,
        device=device.type,
        pixel_version=options.pixel_version,
        decoder=decoder,
        compiled=_compiled(options, device),
        crop_area=options.crop_area,
        **software(),
    )
    # Nothing is made in a folder that is complete, so it does not matter with what versions this one would.
    manifest = finished(options.out, {**asdict(job), "images": None, **dict.fromkeys(SOFTWARE)})
    return Prepared(index, count, device, model, job, manifest)


def _compiled(options: Options, device: torch.device) -> bool:
    """What was asked for; else what the job of the folder, or the device, does."""
    if options.compiled is not None:
        compiled = options.compiled
    elif options.out.exists(JOB_NAME):
        compiled = read_job(options.out).compiled
    else:
        compiled = compiles_by_default(device)
    if compiled:
        check_compiles(device)
    return compiled


def make(options: Options, prepared: Prepared, parts: Sequence[Part], entries: int) -> WorkerReport:
    """Make one worker's shards of all parts of a job that is recorded.

    Args:
        entries: images of the whole list.

    Raises:
        UserError: see :meth:`beit_dist.tokenizing.worker.Worker.run`.
    """
    limit, job = rejection_limit(options.max_rejected, entries), prepared.job
    metrics = Metrics(prepared.index)
    encoder = DVAEEncoder(prepared.model.to(prepared.device), options.precision, compiled=job.compiled)
    report = WorkerReport(0, 0, 0, ())
    with _exporter(options, metrics) as exporter:
        if exporter.port is not None:
            print(f"metrics: port {exporter.port}", file=sys.stderr, flush=True)
        for part in parts:
            worker = Worker(
                part,
                encoder,
                index=prepared.index,
                count=prepared.count,
                decoders=decoders_of(options.decoders, part.sources.entries),
                max_rejected=limit,
                rejected=report.rejected,
                access=options.access,
                metrics=metrics,
                warm_up=functools.partial(encoder.warm_up, job.batch, job.token_size),
            )
            report = report.plus(worker.run())
    return report


def _exporter(options: Options, metrics: Metrics) -> Exporter:
    return Exporter(metrics, options.metrics_port, options.metrics_textfile, options.metrics_address)


def decoders_of(wanted: int | None, entries: int) -> int:
    """Decoding processes: as many as ``wanted`` (None: one for each core), and have something to do."""
    if wanted is None:
        wanted = min(MAX_DECODERS, len(os.sched_getaffinity(0)))
    return min(wanted, -(-entries // CHUNK))
