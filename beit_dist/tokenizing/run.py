"""The steps of the job as a user starts them: freeze, work (one worker alone does everything), finish."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from beit_dist.data.images import Augment
from beit_dist.data.listing import expand_sources
from beit_dist.data.shards import Manifest
from beit_dist.errors import ConfigError
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place
from beit_dist.tokenizing.decoding import CHUNK
from beit_dist.tokenizing.encoder import DVAEEncoder
from beit_dist.tokenizing.finish import finish, finished
from beit_dist.tokenizing.freeze import check_same_sources, freeze
from beit_dist.tokenizing.job import SOFTWARE, Job, Precision, record_job, software
from beit_dist.tokenizing.metrics import Exporter, Metrics
from beit_dist.tokenizing.rejected import Rejected, rejection_limit
from beit_dist.tokenizing.sources import SourceList, read_header
from beit_dist.tokenizing.tokenizer_file import tokenizer_at
from beit_dist.tokenizing.worker import Worker
from beit_dist.tokenizing.worker_index import worker_index
from beit_dist.visual_tokens.weights import load_tokenizer

MAX_DECODERS = 16


@dataclass(frozen=True)
class Options:
    """What the user asked for; see ``tools/shard_tokens.py`` for each. None: to be found out."""

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
    device: str | None
    decoders: int | None
    index: int | None
    count: int | None
    max_rejected: str
    finish: bool
    access: Access
    metrics_port: int | None
    metrics_textfile: Path | None
    sniff: bool = False


@dataclass(frozen=True)
class Outcome:
    """How :func:`work` ended; ``manifest`` is None until the job is finished."""

    index: int
    count: int
    made: int
    kept: int
    images: int
    rejected: tuple[Rejected, ...]
    manifest: Manifest | None


def work(options: Options, environment: Mapping[str, str]) -> Outcome:
    """Be one worker of the job. One worker alone also freezes the list and finishes.

    Raises:
        UserError: see the parts; nothing is written before the settings are known to be valid.
    """
    out = options.out
    index, count = worker_index(options.index, options.count, environment)
    device = _device(options.device)
    rejection_limit(options.max_rejected, 0)
    if options.decoders is not None and options.decoders < 0:
        raise ConfigError("--decoders", options.decoders, "0 or more")
    metrics = Metrics(index)
    exporter = Exporter(metrics, options.metrics_port, options.metrics_textfile)
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
        **software(),
    )
    # Nothing is made in a folder that is complete, so it does not matter with what versions this one would.
    manifest = finished(out, {**asdict(job), "images": None, **dict.fromkeys(SOFTWARE)})
    _freeze_or_check(options, count)
    sources = SourceList(out, options.shard_samples)
    if manifest is not None:
        return Outcome(index, count, 0, sources.shards, 0, (), manifest)
    job = replace(job, images=sources.sha256)
    limit = rejection_limit(options.max_rejected, sources.header.entries)
    record_job(out, job)
    encoder = DVAEEncoder(model.to(device), options.precision)
    decoders = _decoders(options.decoders, sources.header.entries)
    worker = Worker(
        out,
        job,
        sources,
        encoder,
        index=index,
        count=count,
        decoders=decoders,
        max_rejected=limit,
        access=options.access,
        metrics=metrics,
    )
    with exporter:
        if exporter.port is not None:
            print(f"metrics: port {exporter.port}", file=sys.stderr, flush=True)
        report = worker.run()
    if count == 1 and options.finish:
        manifest = finish(out, asdict(job), options.max_rejected)
    return Outcome(index, count, *report, manifest)


def _freeze_or_check(options: Options, count: int) -> None:
    """One worker freezes; several only read, since two of them would freeze a changing folder differently."""
    if count == 1:
        freeze(options.images, options.out, options.seed, options.access, sniff=options.sniff)
    else:
        header = read_header(options.out)
        sources = expand_sources(options.images, options.access)
        check_same_sources(header, sources, options.seed, options.out)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError("--device", name, "cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", name, "a device of this machine", "It has no usable CUDA device: use cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError("--device", name, f"cuda:N with N below {torch.cuda.device_count()}, on this machine")
    return device


def _decoders(wanted: int | None, entries: int) -> int:
    if wanted is None:
        wanted = min(MAX_DECODERS, len(os.sched_getaffinity(0)))
    return min(wanted, -(-entries // CHUNK))
