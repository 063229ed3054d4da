"""The steps of the job as a user starts them: freeze, work (one worker alone does everything), finish."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from beit_dist.engine.device import device_of
from beit_dist.errors import ConfigError
from beit_dist.images.decoding import Augment
from beit_dist.images.jpeg_decoders import Decoder, decoder_version
from beit_dist.images.listing import expand_sources
from beit_dist.models.dvae import DVAE
from beit_dist.shards.manifest import Manifest
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place
from beit_dist.tokenizing.decoding import CHUNK
from beit_dist.tokenizing.describing import Planned, aligned
from beit_dist.tokenizing.encoder import DVAEEncoder, check_compiles, compiles_by_default
from beit_dist.tokenizing.finish import finish, finished
from beit_dist.tokenizing.freeze import check_same_sources, freeze
from beit_dist.tokenizing.job import (
    JOB_NAME,
    SOFTWARE,
    Job,
    PixelVersion,
    Precision,
    read_job,
    record_job,
    software,
)
from beit_dist.tokenizing.metrics import Exporter, Metrics
from beit_dist.tokenizing.parts import check_held_out, parts_of
from beit_dist.tokenizing.rejected import Rejected, rejection_limit
from beit_dist.tokenizing.sources import SourceList, read_header
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


@dataclass(frozen=True)
class Outcome:
    """How :func:`work` ended, held-out images included; ``manifest`` is None until the job is finished."""

    index: int
    count: int
    made: int
    kept: int
    images: int
    rejected: tuple[Rejected, ...]
    manifest: Manifest | None


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


def work(options: Options, environment: Mapping[str, str]) -> Outcome:
    """Be one worker of the job. One worker alone also freezes the list and finishes.

    Raises:
        UserError: see the parts; nothing is written before the settings are known to be valid.
    """
    out = options.out
    prepared = prepare(options, environment)
    index, count, job, manifest = prepared.index, prepared.count, prepared.job, prepared.manifest
    _freeze_or_check(options, count)
    sources = SourceList(out, options.shard_samples)
    parts = parts_of(out, replace(job, images=sources.sha256), sources)
    if manifest is not None:
        return Outcome(index, count, 0, sum(part.sources.shards for part in parts), 0, (), manifest)
    limit = rejection_limit(options.max_rejected, sources.header.entries)
    for part in reversed(parts):  # of the folder itself first: if it is another job's, that is what to say
        record_job(part.out, part.job)
    header = sources.header
    planned = Planned(out, job, options.images, options.tokenizer, header.entries, header.held_out)
    print("\n".join(aligned(planned.rows())), flush=True)
    metrics = Metrics(index)
    exporter = _exporter(options, metrics)
    encoder = DVAEEncoder(prepared.model.to(prepared.device), options.precision, compiled=job.compiled)
    with exporter:
        if exporter.port is not None:
            print(f"metrics: port {exporter.port}", file=sys.stderr, flush=True)
        report = WorkerReport(0, 0, 0, ())
        for part in parts:
            worker = Worker(
                part,
                encoder,
                index=index,
                count=count,
                decoders=decoders_of(options.decoders, part.sources.entries),
                max_rejected=limit,
                rejected=report.rejected,
                access=options.access,
                metrics=metrics,
                warm_up=functools.partial(encoder.warm_up, job.batch, job.token_size),
            )
            report = report.plus(worker.run())
    if count == 1 and options.finish:
        manifest = finish(out, asdict(parts[-1].job), options.max_rejected)
    return Outcome(index, count, *report, manifest)


def _exporter(options: Options, metrics: Metrics) -> Exporter:
    return Exporter(metrics, options.metrics_port, options.metrics_textfile, options.metrics_address)


def _freeze_or_check(options: Options, count: int) -> None:
    """One worker freezes; several only read, since two of them would freeze a changing folder differently."""
    if count == 1:
        freeze(
            options.images,
            options.out,
            options.seed,
            options.access,
            sniff=options.sniff,
            held_out=options.held_out,
        )
    else:
        header = read_header(options.out)
        sources = expand_sources(options.images, options.access)
        check_same_sources(header, sources, options.seed, options.out, held_out=options.held_out)


def decoders_of(wanted: int | None, entries: int) -> int:
    """Decoding processes: as many as ``wanted`` (None: one for each core), and have something to do."""
    if wanted is None:
        wanted = min(MAX_DECODERS, len(os.sched_getaffinity(0)))
    return min(wanted, -(-entries // CHUNK))
