"""Every metric's name, kind and unit in one table, and the Prometheus endpoint that serves them on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from beit_dist.config.run import LoggingConfig
from beit_dist.engine.endpoint import Endpoint, Health
from beit_dist.step_numbers import Number

ADDRESS = "logging.metrics_address"


@dataclass(frozen=True)
class Metric:
    """One row of the table. Counters are exported with ``_total``, an info with ``_info`` behind its name."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("beit_build", "info", "Kind of training, run, versions, ZeRO stage and precision of this process."),
    Metric("beit_train_attempt", "gauge", "Number of this start of the run; each start adds one."),
    Metric("beit_train_first_step", "gauge", "Step after which this start continues; 0 for a new run."),
    Metric("beit_train_start_timestamp_seconds", "gauge", "Unix time at which this start was ready to train."),
    Metric("beit_train_steps", "counter", "Optimizer steps attempted, over all starts of the run."),
    Metric("beit_train_steps_skipped", "counter", "Steps without an update, because gradients were not finite."),
    Metric("beit_train_loss_spikes", "counter", "Steps whose loss was far above that of the steps before."),
    Metric("beit_train_samples", "counter", "Samples trained on."),
    Metric("beit_train_target_steps", "gauge", "Steps at which the run is done."),
    Metric("beit_train_epoch", "gauge", "Passes over the data so far, including fractions."),
    Metric("beit_train_grad_norm", "gauge", "Global L2 norm of the gradients before clipping, last fetched step."),
    Metric("beit_train_learning_rate", "gauge", "Learning rate of the last fetched step."),
    Metric("beit_train_samples_per_second", "gauge", "Samples a second over the last logging interval."),
    Metric(
        "beit_train_model_flops_per_second", "gauge", "Model FLOPs a second over the last interval, all ranks."
    ),
    Metric(
        "beit_train_last_step_timestamp_seconds",
        "gauge",
        "Unix time at which rank 0 last ended a step, or a measurement or save that held up the steps.",
    ),
    Metric(
        "beit_train_stall_limit_seconds",
        "gauge",
        "Time without a step after which a rank counts as hanging (watchdog.stall_seconds).",
    ),
    Metric("beit_train_stalls", "counter", "How often no step ended on rank 0 for watchdog.stall_seconds."),
    Metric(
        "beit_train_step_duration_max_over_mean_ratio",
        "gauge",
        "Own time (data and forward) in a step: the slowest rank's, divided by the mean.",
    ),
    Metric("beit_train_slowest_rank", "gauge", "Rank that spent the most time of its own in a step."),
    Metric(
        "beit_train_straggler_cost_ratio",
        "gauge",
        "Share of a step by which the slowest rank's own time exceeds the mean.",
    ),
    Metric("beit_train_world_size", "gauge", "Number of ranks."),
    Metric(
        "beit_train_baseline",
        "gauge",
        "Value that a number reaches without learning from images, on training data or on held-out data.",
        ("number", "baseline", "data"),
    ),
    Metric("beit_validation_step", "gauge", "Step after which the held-out loss was last measured."),
    Metric("beit_validation_duration_seconds", "histogram", "Time that a measurement held up training."),
    Metric("beit_data_wait_ratio", "gauge", "Share of the last interval in which rank 0 waited for data."),
    Metric("beit_checkpoint_saves", "counter", "Checkpoints by result: ok or failed.", ("result",)),
    Metric("beit_checkpoint_damaged", "counter", "Damaged checkpoints skipped at the start."),
    Metric("beit_checkpoint_stall_seconds", "histogram", "Time that a save held up training."),
    Metric("beit_checkpoint_duration_seconds", "histogram", "Time from the start of a save to its commit."),
    Metric(
        "beit_checkpoint_last_success_timestamp_seconds",
        "gauge",
        "Unix time of the last checkpoint that this start committed.",
    ),
    Metric("beit_checkpoint_every_seconds", "gauge", "Time between checkpoints (checkpoint.every_minutes)."),
    Metric("beit_checkpoint_every_steps", "gauge", "Steps between checkpoints (checkpoint.every_steps)."),
    Metric(
        "beit_run_disk_free_bytes",
        "gauge",
        "Space left for the run folder; of a run in a store, for the temporary files of rank 0.",
    ),
)
"""What every kind of training exports; its numbers come to it, and what it has besides."""

_DURATIONS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)


def table_of(
    numbers: Iterable[Number], measured: Iterable[Number] = (), others: Iterable[Metric] = ()
) -> tuple[Metric, ...]:
    """All metrics of a kind of training.

    Args:
        numbers: of its steps.
        measured: on held-out data.
        others: what it exports besides.
    """
    trained = [Metric(number.metric, number.kind, number.help) for number in numbers if number.metric]
    held_out = [
        Metric(number.held_out, "gauge", f"On held-out data: {number.help}")
        for number in measured
        if number.held_out
    ]
    return (*METRICS, *trained, *held_out, *others)


class Metrics:
    """A table as live collectors in a registry of its own. A gauge is absent until it is set: it would say 0."""

    def __init__(self, table: Iterable[Metric] = METRICS) -> None:
        self.registry = CollectorRegistry()
        self._collectors: dict[str, Any] = {}
        self._unknown: set[str] = set()
        for metric in table:
            arguments: dict[str, Any] = {"labelnames": metric.labels}
            if metric.kind == "histogram":
                arguments["buckets"] = _DURATIONS
            kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram, "info": Info}
            collector = kinds[metric.kind](metric.name, metric.help, registry=None, **arguments)
            self._collectors[metric.name] = collector
            if metric.kind == "gauge":
                self._unknown.add(metric.name)
            else:
                self.registry.register(collector)
        self._endpoint: Endpoint | None = None

    def set(self, values: Mapping[str, float]) -> None:
        """Set gauges by name."""
        for name, value in values.items():
            self._collectors[name].set(value)
            self._show(name)

    def set_labelled(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge that has labels."""
        self._collectors[name].labels(**labels).set(value)
        self._show(name)

    def _show(self, name: str) -> None:
        if name in self._unknown:
            self._unknown.remove(name)
            self.registry.register(self._collectors[name])

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

    def serve(self, settings: LoggingConfig, health: Callable[[], Health] | None = None) -> int | None:
        """Start the endpoint; the port it listens on, or None when it is off.

        Args:
            settings: where it listens.
            health: what ``/healthz`` says.

        Raises:
            ConfigError: the address is not one of this host.
        """
        if settings.metrics_port is None:
            return None
        address, port = settings.metrics_address, settings.metrics_port
        self._endpoint = Endpoint(self.registry, address, port, ADDRESS, health)
        return self._endpoint.port

    def close(self) -> None:
        """Stop the endpoint."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
