"""``/healthz`` tells whether steps end, or images are written."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beit_dist.config.run import LoggingConfig, WatchdogConfig
from beit_dist.engine.endpoint import Health
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.ranks.watchdog import Watchdog
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.start import _health
from beit_dist.tokenizing.metrics import STALL_SECONDS, Exporter
from beit_dist.tokenizing.metrics import Metrics as WorkerMetrics


@pytest.fixture
def watchdog(tmp_path: Path) -> Watchdog:
    """Of rank 0, which has metrics and has taken no step."""
    watched = Watchdog(WatchdogConfig(stall_seconds=60), tmp_path / "ranks", 0)
    watched.metrics = Metrics()
    return watched


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def told(port: int) -> tuple[int, str, Any]:
    """Status, state and limit."""
    status, body = get(port, "/healthz")
    said = json.loads(body)
    assert set(said) == {"state", "silent_seconds", "limit_seconds"}
    return status, said["state"], said["limit_seconds"]


def test_a_training_starts_works_stalls_works_again_and_fails(watchdog: Watchdog, tmp_path: Path) -> None:
    run, process = RunFolder(tmp_path), SimpleNamespace(watchdog=watchdog)
    metrics = watchdog.metrics
    assert metrics is not None
    port = metrics.serve(LoggingConfig(metrics_port=0), lambda: _health(process, run))  # type: ignore[arg-type]
    assert port is not None
    try:
        assert told(port) == (200, "starting", None)
        watchdog._last -= 1e6  # the start is not watched, unless it is asked for
        assert told(port) == (200, "starting", None)
        watchdog.beat()
        assert told(port) == (200, "working", 60.0)
        watchdog._last -= 61
        assert told(port) == (503, "stalled", 60.0)
        watchdog.beat()
        assert told(port) == (200, "working", 60.0)
        run.mark_failed(0.0, rank=3)
        assert told(port) == (503, "failed", 60.0)
    finally:
        metrics.close()


def test_each_beat_is_the_time_of_the_last_step(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = watchdog.metrics
    assert metrics is not None
    value = metrics.registry.get_sample_value
    assert value("beit_train_last_step_timestamp_seconds") is None
    for now in (1000.0, 1007.5):
        monkeypatch.setattr("time.time", lambda now=now: now)
        watchdog.beat()
        assert value("beit_train_last_step_timestamp_seconds") == now


def test_a_worker_starts_works_and_stalls() -> None:
    metrics = WorkerMetrics(2)
    with Exporter(metrics, 0, None) as exporter:
        assert exporter.port is not None
        assert told(exporter.port) == (200, "starting", None)
        metrics.plan(images=10, shards=1, images_done=0, shards_done=0)
        assert told(exporter.port) == (200, "working", STALL_SECONDS)
        metrics._written -= STALL_SECONDS + 1
        assert told(exporter.port) == (503, "stalled", STALL_SECONDS)
        metrics.images(1)
        assert told(exporter.port) == (200, "working", STALL_SECONDS)


def test_the_metrics_are_still_there_and_without_a_watchdog_no_health() -> None:
    metrics = Metrics()
    port = metrics.serve(LoggingConfig(metrics_port=0))
    assert port is not None
    try:
        assert b"beit_train_steps_total" in get(port, "/metrics")[1]
        assert get(port, "/healthz") == (404, b"")
    finally:
        metrics.close()


def test_a_limit_that_is_not_known_is_never_passed() -> None:
    assert Health.by_time(1e9, None, begun=False).state == "starting"
    assert Health.by_time(10.0, 10.0, begun=True).state == "working"
