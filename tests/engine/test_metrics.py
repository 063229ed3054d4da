"""Numbers reach metrics.jsonl exactly and the endpoint by the names of the table."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from beit_dist.config import LoggingConfig
from beit_dist.data import counts
from beit_dist.engine.metrics import METRICS, TOKENIZER_METRICS, Metric, Metrics
from beit_dist.engine.record import Recorder, StepFacts
from beit_dist.engine.run_folder import DONE, FAILED, RunFolder
from beit_dist.engine.step_log import LogSettings
from beit_dist.errors import ConfigError


def facts(step: int, masked: int = 7, applied: bool = True) -> StepFacts:
    return StepFacts(
        step=step,
        samples=8 * step,
        epoch=step / 4,
        lr=0.1,
        masked=masked,
        bad=0,
        applied=applied,
        wait_seconds=0.0,
    )


def recorder(run: RunFolder, every: int = 2) -> Recorder:
    run.create()
    return Recorder(
        run,
        Metrics(),
        LogSettings(every=every, attempt=3, total_steps=10, batch=8, progress=False),
        flops_per_sample=5,
    )


def lines(run: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_the_loss_of_every_step_is_written_as_an_exact_float32(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    writer = recorder(run)
    sums = torch.tensor([1.1, 2.7, 3.3], dtype=torch.float32)
    for step, loss_sum in enumerate(sums, start=1):
        writer.add(facts(step), loss_sum, torch.tensor(3.0), 0.5)
        assert len(lines(run)) == (step // 2) * 2  # fetched at the logging interval only
    writer.flush()
    writer.close()
    got = [np.float32(line["loss"]) for line in lines(run)]
    assert got == [np.float32(value) / np.float32(7) for value in sums.numpy()]
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    assert {line["attempt"] for line in lines(run)} == {3}


def test_numbers_that_are_not_finite_become_null_not_invalid_json(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    writer = recorder(run, every=1)
    writer.add(facts(1, applied=False), torch.tensor(float("nan")), torch.tensor(0.0), float("inf"))
    writer.close()
    assert "NaN" not in run.metrics.read_text()
    line = lines(run)[0]
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (None, None, True)


def test_a_resumed_run_forgets_the_lines_past_its_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    with run.metrics.open("a") as old:
        old.write('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
        old.flush()
        run.forget_steps_after(2)
        old.write("an older process writes into nothing")
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_first_failure_stands(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.mark_failed(0.0, rank=1) is None
    assert run.mark_failed(0.0, rank=0)["rank"] == 1  # type: ignore[index]
    assert json.loads((tmp_path / FAILED).read_text())["rank"] == 1
    run.mark(DONE, step=1)
    run.mark(DONE, step=2)
    assert json.loads((tmp_path / DONE).read_text())["step"] == 2
    run.remove_markers()
    assert not list(tmp_path.iterdir())


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture
def scraped() -> str:
    """What the endpoint answers when every metric has a value."""
    metrics = Metrics()
    port = metrics.serve(LoggingConfig(metrics_port=0, metrics_address="127.0.0.1"))
    assert port is not None
    metrics.describe(run="r", torch="2")
    metrics.add("beit_train_steps", 5)
    metrics.add("beit_checkpoint_saves", result="ok")
    metrics.add("beit_storage_retries", cause="cut")
    metrics.observe("beit_checkpoint_duration_seconds", 0.2)
    metrics.observe("beit_checkpoint_stall_seconds", 0.01)
    try:
        return scrape(port)
    finally:
        metrics.close()


def test_the_endpoint_serves_every_metric_of_the_table(scraped: str) -> None:
    text = scraped
    suffix = {"counter": "_total", "info": "_info", "histogram": "_count", "gauge": ""}
    for metric in METRICS:
        assert f"{metric.name}{suffix[metric.kind]}" in text
    assert "beit_train_steps_total 5.0" in text
    assert 'beit_checkpoint_saves_total{result="ok"} 1.0' in text
    assert 'run="r"' in text


def test_what_reading_took_is_exported_with_the_steps(tmp_path: Path) -> None:
    counts.take()
    counts.give({"beit_data_read_bytes": {"store": 500}, "beit_storage_retries": {"cut": 2}})
    counts.bytes_read.add("store", 20)
    writer = recorder(RunFolder(tmp_path), every=1)
    metrics = writer._metrics
    assert metrics is not None
    writer.add(facts(1), torch.tensor(1.0), torch.tensor(1.0), 0.5)
    writer.close()
    value = metrics.registry.get_sample_value
    assert value("beit_data_read_bytes_total", {"source": "store"}) == 520
    assert value("beit_storage_retries_total", {"cause": "cut"}) == 2
    assert counts.take() == {}


@pytest.mark.server
def test_prometheus_finds_nothing_to_complain_about_in_what_is_served(scraped: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    else:
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=scraped, capture_output=True, text=True, timeout=60
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_port_in_use_does_not_stop_a_run(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        metrics = Metrics()
        got = metrics.serve(LoggingConfig(metrics_port=port, metrics_address="127.0.0.1"))
        metrics.close()
    assert got not in (None, port)
    assert f"metrics port {port} is in use" in caplog.text


def test_an_address_of_another_host_is_named() -> None:
    with pytest.raises(ConfigError, match=r"metrics_address: got '192\.0\.2\.1', expected an address of rank 0"):
        Metrics().serve(LoggingConfig(metrics_port=0, metrics_address="192.0.2.1"))


def test_the_endpoint_can_be_turned_off() -> None:
    assert Metrics().serve(LoggingConfig(metrics_port=None)) is None


@pytest.mark.parametrize("table", [METRICS, TOKENIZER_METRICS], ids=["pre-training", "tokenizer"])
def test_names_follow_prometheus_conventions(table: tuple[Metric, ...]) -> None:
    for metric in table:
        assert metric.name.startswith("beit_")
        assert not metric.name.endswith(("_total", "_info"))
        assert metric.help.endswith(".")
    assert len({metric.name for metric in table}) == len(table)
