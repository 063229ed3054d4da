"""Every metric's name, kind and unit in one table, and the Prometheus endpoint that serves them on rank 0."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from beit_dist.config import LoggingConfig
from beit_dist.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One row of the table. Counters are exported with ``_total``, an info with ``_info`` behind its name."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("beit_build", "info", "Versions, ZeRO stage, precision and run of this process."),
    Metric("beit_train_steps", "counter", "Optimizer steps attempted, over all starts of the run."),
    Metric("beit_train_steps_skipped", "counter", "Steps without an update, for gradients that were not finite."),
    Metric("beit_train_loss_spikes", "counter", "Steps whose loss lay far above those before it."),
    Metric("beit_train_samples", "counter", "Samples trained on."),
    Metric("beit_train_masked_patches", "counter", "Masked patches whose tokens were predicted."),
    Metric("beit_train_target_steps", "gauge", "Steps at which the run is done."),
    Metric("beit_train_epoch", "gauge", "Passes over the data so far, with fraction."),
    Metric(
        "beit_train_loss", "gauge", "Mean cross-entropy of the masked patches in the last fetched step, in nats."
    ),
    Metric(
        "beit_train_accuracy_ratio", "gauge", "Masked patches whose token was predicted right, last fetched step."
    ),
    Metric("beit_train_grad_norm", "gauge", "Global L2 norm of the gradients before clipping, last fetched step."),
    Metric("beit_train_learning_rate", "gauge", "Learning rate of the last fetched step."),
    Metric("beit_train_samples_per_second", "gauge", "Samples a second over the last logging interval."),
    Metric(
        "beit_train_model_flops_per_second", "gauge", "Model FLOPs a second over the last interval, all ranks."
    ),
    Metric("beit_train_last_step_timestamp_seconds", "gauge", "Unix time at which the last step ended."),
    Metric("beit_train_stalls", "counter", "Times that no step of rank 0 ended for watchdog.stall_seconds."),
    Metric(
        "beit_train_step_duration_max_over_mean_ratio",
        "gauge",
        "Slowest rank's own time in a step, data and forward, over the ranks' mean.",
    ),
    Metric("beit_train_slowest_rank", "gauge", "Rank with the most own time in a step."),
    Metric("beit_train_world_size", "gauge", "Ranks."),
    Metric("beit_validation_loss", "gauge", "Mean cross-entropy of the held-out masked patches, in nats."),
    Metric("beit_validation_accuracy_ratio", "gauge", "Held-out masked patches whose token was predicted right."),
    Metric("beit_validation_step", "gauge", "Step after which the held-out loss was last measured."),
    Metric("beit_validation_duration_seconds", "histogram", "Time that a measurement held up training."),
    Metric("beit_data_wait_ratio", "gauge", "Share of the last interval in which rank 0 waited for data."),
    Metric("beit_data_bad_samples", "counter", "Damaged samples trained around with weight 0."),
    Metric(
        "beit_data_read_bytes", "counter", "Bytes of shards read for rank 0: disk, store or cache.", ("source",)
    ),
    Metric(
        "beit_data_cache_lookups",
        "counter",
        "Blocks asked of loader.cache_dir for rank 0: hit, miss, damaged or failed.",
        ("result",),
    ),
    Metric(
        "beit_data_samples_read_again",
        "counter",
        "Samples of rank 0 that were damaged when first read: whole or damaged when read again.",
        ("result",),
    ),
    Metric("beit_checkpoint_saves", "counter", "Checkpoints by result: ok or failed.", ("result",)),
    Metric("beit_checkpoint_damaged", "counter", "Damaged checkpoints passed over at the start."),
    Metric("beit_checkpoint_stall_seconds", "histogram", "Time that a save held up training."),
    Metric("beit_checkpoint_duration_seconds", "histogram", "Time from the start of a save to its commit."),
    Metric(
        "beit_checkpoint_last_success_timestamp_seconds", "gauge", "Unix time of the last committed checkpoint."
    ),
    Metric(
        "beit_storage_retries",
        "counter",
        "Requests to a store tried again, by rank 0 and its loaders.",
        ("cause",),
    ),
)

_SHARED = (
    *(
        "beit_build",
        "beit_train_steps",
        "beit_train_steps_skipped",
        "beit_train_samples",
        "beit_train_target_steps",
    ),
    *("beit_train_epoch", "beit_train_grad_norm", "beit_train_learning_rate", "beit_train_samples_per_second"),
    *("beit_train_last_step_timestamp_seconds", "beit_train_stalls", "beit_train_world_size"),
    *("beit_data_wait_ratio", "beit_validation_step", "beit_validation_duration_seconds"),
    *("beit_checkpoint_saves", "beit_checkpoint_damaged", "beit_checkpoint_stall_seconds"),
    *("beit_checkpoint_duration_seconds", "beit_checkpoint_last_success_timestamp_seconds"),
)
"""Names that mean the same in a tokenizer's training."""

TOKENIZER_METRICS = (
    *(metric for metric in METRICS if metric.name in _SHARED),
    Metric(
        "beit_tokenizer_loss", "gauge", "What is minimised in a tokenizer's training, in nats for a pixel value."
    ),
    Metric(
        "beit_tokenizer_nll", "gauge", "Its first part: -ln likelihood of the pixels, in nats for a pixel value."
    ),
    Metric("beit_tokenizer_kl", "gauge", "KL of a position's token distribution to the uniform one, in nats."),
    Metric("beit_tokenizer_usage_kl", "gauge", "KL of the batch's average token distribution, in nats."),
    Metric("beit_tokenizer_perplexity", "gauge", "Tokens in use, weighted by how evenly, over about 50 steps."),
    Metric("beit_tokenizer_dead_tokens", "gauge", "Tokens that were likeliest nowhere in about 200 steps."),
    Metric("beit_tokenizer_vocabulary", "gauge", "Tokens that there are."),
    Metric("beit_tokenizer_temperature", "gauge", "Gumbel-softmax temperature of the last fetched step."),
    Metric("beit_tokenizer_kl_weight", "gauge", "Weight of the KL term in the last fetched step."),
    Metric(
        "beit_tokenizer_held_out_psnr_decibels", "gauge", "Reconstructions of held-out images from hard tokens."
    ),
    Metric(
        "beit_tokenizer_held_out_perplexity", "gauge", "Tokens in use on held-out images, weighted by how evenly."
    ),
    Metric("beit_tokenizer_held_out_dead_tokens", "gauge", "Tokens that occur in no held-out image."),
)
"""What the training of a tokenizer exports."""

_DURATIONS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)


class Metrics:
    """A table as live collectors in a registry of its own."""

    def __init__(self, table: Sequence[Metric] = METRICS) -> None:
        self.registry = CollectorRegistry()
        self._collectors: dict[str, Any] = {}
        for metric in table:
            arguments: dict[str, Any] = {"labelnames": metric.labels, "registry": self.registry}
            if metric.kind == "histogram":
                arguments["buckets"] = _DURATIONS
            kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram, "info": Info}
            self._collectors[metric.name] = kinds[metric.kind](metric.name, metric.help, **arguments)
        self._server: Any = None

    def set(self, values: Mapping[str, float]) -> None:
        """Set gauges by name."""
        for name, value in values.items():
            self._collectors[name].set(value)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raise a counter."""
        collector = self._collectors[name]
        (collector.labels(**labels) if labels else collector).inc(amount)

    def observe(self, name: str, value: float) -> None:
        """Record one value of a histogram."""
        self._collectors[name].observe(value)

    def describe(self, **facts: str) -> None:
        """Set the labels of ``beit_build_info``."""
        self._collectors["beit_build"].info(facts)

    def serve(self, settings: LoggingConfig) -> int | None:
        """Start the endpoint; the port it listens on, or None when it is off.

        A port in use, or below 1024 and not ours to take, must not stop a run: a free one is taken, logged, and
        written to ``run.json``.

        Raises:
            ConfigError: the address is not one of this host.
        """
        if settings.metrics_port is None:
            return None
        for port in (settings.metrics_port, 0):
            try:
                self._server, _ = start_http_server(port, settings.metrics_address, registry=self.registry)
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES) or port == 0:
                    raise ConfigError(
                        "logging.metrics_address",
                        settings.metrics_address,
                        "an address of rank 0's host",
                        error.strerror or "",
                    ) from None
                reason = "is in use" if error.errno == errno.EADDRINUSE else "is the system's"
                _log.warning("metrics port %d %s; taking a free one", port, reason)
                continue
            return int(self._server.server_port)
        return None

    def close(self) -> None:
        """Stop the endpoint."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
