"""A worker's numbers for Prometheus: served on a port, or in a file for node_exporter's textfile collector."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, write_to_textfile

from beit_dist.engine.endpoint import Endpoint, Health, check_address
from beit_dist.engine.metrics import Metric
from beit_dist.errors import ConfigError

_log = logging.getLogger(__name__)

Stage = Literal["read", "decode", "encode", "write", "publish"]
STAGES: tuple[Stage, ...] = ("read", "decode", "encode", "write", "publish")
_FILE_SECONDS = 15.0
STALL_SECONDS = 600.0
"""Time in which nothing is written and after which a worker counts as stalled."""
_ADDRESS = "--metrics-address"


METRICS = (
    Metric(
        "beit_tokenize_images",
        "counter",
        "Images of this worker's shards that are done, including those of earlier starts.",
        ("worker",),
    ),
    Metric("beit_tokenize_images_planned", "gauge", "Images of this worker's shards, done or not.", ("worker",)),
    Metric(
        "beit_tokenize_images_rejected",
        "counter",
        "Images found unusable since the start, by reason.",
        ("worker", "reason"),
    ),
    Metric("beit_tokenize_shards_finished", "gauge", "Shards of this worker that are committed.", ("worker",)),
    Metric("beit_tokenize_shards_planned", "gauge", "Shards of this worker, committed or not.", ("worker",)),
    Metric(
        "beit_tokenize_stage_seconds",
        "counter",
        "Time spent in each stage, over all its processes.",
        ("worker", "stage"),
    ),
    Metric(
        "beit_tokenize_last_progress_timestamp_seconds",
        "gauge",
        "Unix time at which images were last written.",
        ("worker",),
    ),
    Metric(
        "beit_storage_retries",
        "counter",
        "Requests to a store that were sent again, by cause.",
        ("worker", "cause"),
    ),
)
"""What a worker exports."""


class Metrics:
    """The numbers of one worker; any thread may change them.

    Every series has the label ``worker``, so that the files of several workers on one machine go together.
    """

    def __init__(self, worker: int) -> None:
        self.registry = CollectorRegistry()
        self._worker = str(worker)
        self._written = time.monotonic()
        self._begun = False
        kinds: dict[str, type[Any]] = {"counter": Counter, "gauge": Gauge}
        self._collectors = {
            metric.name: kinds[metric.kind](metric.name, metric.help, metric.labels, registry=self.registry)
            for metric in METRICS
        }
        for stage in STAGES:
            self.spent(stage, 0.0)

    def plan(self, images: int, shards: int, images_done: int, shards_done: int) -> None:
        """What there is to do in one part of the job, and what an earlier start has done of it."""
        self._of("beit_tokenize_images_planned").inc(images)
        self._of("beit_tokenize_shards_planned").inc(shards)
        self._of("beit_tokenize_shards_finished").inc(shards_done)
        self._of("beit_tokenize_images").inc(images_done)
        self._advanced()

    def images(self, count: int) -> None:
        """So many more images are written or rejected."""
        self._of("beit_tokenize_images").inc(count)
        self._advanced()

    def rejected(self, kind: str) -> None:
        """One more image is rejected."""
        self._of("beit_tokenize_images_rejected", kind).inc()

    def shard(self) -> None:
        """One more shard is committed."""
        self._of("beit_tokenize_shards_finished").inc()

    def spent(self, stage: Stage, seconds: float) -> None:
        """A stage took so long."""
        self._of("beit_tokenize_stage_seconds", stage).inc(seconds)

    def retried(self, causes: Mapping[str, int]) -> None:
        """Requests were tried again, so many for each cause."""
        for cause, count in causes.items():
            self._of("beit_storage_retries", cause).inc(count)

    def health(self) -> Health:
        """Whether images are written."""
        silent = time.monotonic() - self._written
        return Health.by_time(silent, STALL_SECONDS if self._begun else None, self._begun)

    def timed(self, stage: Stage) -> _Timer:
        """``with metrics.timed("encode"): ...``"""
        return _Timer(self, stage)

    def _advanced(self) -> None:
        self._begun, self._written = True, time.monotonic()
        self._of("beit_tokenize_last_progress_timestamp_seconds").set_to_current_time()

    def _of(self, name: str, *labels: str) -> Any:
        return self._collectors[name].labels(self._worker, *labels)


class _Timer:
    def __init__(self, metrics: Metrics, stage: Stage) -> None:
        self._metrics, self._stage = metrics, stage

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._metrics.spent(self._stage, time.perf_counter() - self._began)


class Exporter:
    """Shows the numbers outside for as long as the block lasts.

    Args:
        port: of an endpoint; 0 takes any free one, None has none. A port in use must not stop the job: another
            one is taken, and named.
        address: where the endpoint listens.
        file: rewritten whole every 15 seconds and at the end; None writes none. A disk that is full must not
            stop the job either.

    Raises:
        ConfigError: there can be no such port, the address is not this host's, or the file's folder is not there.
    """

    def __init__(self, metrics: Metrics, port: int | None, file: Path | None, address: str = "127.0.0.1") -> None:
        if port is not None and not 0 <= port < 2**16:
            raise ConfigError("--metrics-port", port, "0 to 65535")
        if port is not None:
            check_address(_ADDRESS, address)
        if file is not None and (file.suffix != ".prom" or not file.parent.is_dir()):
            raise ConfigError("--metrics-textfile", str(file), "a file *.prom in a folder that exists")
        self._metrics, self._wanted, self._address, self._file = metrics, port, address, file
        self._done = threading.Event()
        self._endpoint: Endpoint | None = None
        self.port: int | None = None

    def __enter__(self) -> Exporter:
        if self._wanted is not None:
            registry, health = self._metrics.registry, self._metrics.health
            self._endpoint = Endpoint(registry, self._address, self._wanted, _ADDRESS, health)
            self.port = self._endpoint.port
        if self._file is not None:
            self._write()
            self._thread = threading.Thread(target=self._keep_writing, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._file is not None:
            self._thread.join()
            self._write()
        if self._endpoint is not None:
            self._endpoint.close()

    def _keep_writing(self) -> None:
        while not self._done.wait(_FILE_SECONDS):
            self._write()

    def _write(self) -> None:
        try:
            write_to_textfile(str(self._file), self._metrics.registry)
        except OSError as error:
            _log.warning("%s: cannot be written (%s); the work continues", self._file, error.strerror)
