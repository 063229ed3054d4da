"""Numbers reach metrics.jsonl exactly and the endpoint by the names of the table."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.records import a_recorder, sums_of, tables, taken

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.run import LoggingConfig
from beit_dist.engine.endpoint import check_address
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.resume import progress_of
from beit_dist.engine.run_folder import DONE, FAILED, RunFolder
from beit_dist.engine.start import open_metrics
from beit_dist.errors import ConfigError
from beit_dist.step_numbers import KnownBaselines
from beit_dist.stream import counts
from beit_dist.tasks.pretraining.task import Pretraining


def lines(run: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_the_loss_of_every_step_is_written_as_an_exact_float32(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    writer = a_recorder(run)
    sums = torch.tensor([1.1, 2.7, 3.3], dtype=torch.float32)
    for step, loss_sum in enumerate(sums, start=1):
        writer.add(taken(step), sums_of(float(loss_sum)), None, 0.5)
        assert len(lines(run)) == (1, 1, 3)[step - 1]  # fetched after the first step, then at the logging interval
    writer.flush()
    writer.close()
    got = [np.float32(line["loss"]) for line in lines(run)]
    assert got == [np.float32(value) / np.float32(7) for value in sums.numpy()]
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    assert {line["attempt"] for line in lines(run)} == {3}


def test_numbers_that_are_not_finite_become_null_not_invalid_json(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    writer = a_recorder(run, every=1)
    writer.add(taken(1, applied=False), sums_of(float("nan")), None, float("inf"))
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


GAUGES = [metric for metric in tables()["pretraining"] if metric.kind == "gauge"]


def test_what_is_not_known_yet_is_absent_and_not_zero() -> None:
    metrics = Metrics(tables()["pretraining"])

    def exported() -> set[str]:
        return {sample.name for family in metrics.registry.collect() for sample in family.samples}

    assert exported().isdisjoint(metric.name for metric in GAUGES)
    assert "beit_train_steps_total" in exported()  # nothing was counted is something known
    metrics.set({"beit_train_loss": 0.0})
    assert "beit_train_loss" in exported()
    assert "beit_validation_loss" not in exported()


def test_a_new_run_exports_no_number_that_was_not_measured_yet() -> None:
    task = Pretraining(PretrainingConfig(run="r", model={"size": "tiny"}))
    resolved, store = Resolved(1, 1, 1, 0, "fp32", "fp32", {}), SimpleNamespace(passed_over=0, attempt=1)
    metrics = open_metrics(task, resolved, store, progress_of(task, None), 10, KnownBaselines())  # type: ignore[arg-type]
    exported = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    told = {f"beit_train_{name}" for name in ("attempt", "first_step", "start_timestamp_seconds", "target_steps")}
    told |= {"beit_train_world_size", "beit_train_stall_limit_seconds", "beit_checkpoint_every_seconds"}
    assert exported & {metric.name for metric in GAUGES} == told
    value = metrics.registry.get_sample_value
    assert value("beit_checkpoint_saves_total", {"result": "failed"}) == 0  # the first one shall be an increase
    assert value("beit_checkpoint_every_seconds") == 15 * 60


@pytest.fixture
def scraped() -> str:
    """What the endpoint answers when every metric has a value."""
    metrics = Metrics(tables()["pretraining"])
    port = metrics.serve(LoggingConfig(metrics_port=0, metrics_address="127.0.0.1"))
    assert port is not None
    metrics.describe(run="r", torch="2")
    metrics.set({metric.name: 1.0 for metric in GAUGES if not metric.labels})
    metrics.set_labelled("beit_train_baseline", 4.1, number="loss", baseline="frequency", data="training")
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
    for metric in tables()["pretraining"]:
        assert f"{metric.name}{suffix[metric.kind]}" in text
    assert "beit_train_steps_total 5.0" in text
    assert 'beit_checkpoint_saves_total{result="ok"} 1.0' in text
    assert 'run="r"' in text


def test_the_space_left_is_exported_and_a_disk_that_does_not_tell_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path) -> None:
        raise OSError(116, "Stale file handle", path)

    writer = a_recorder(RunFolder(tmp_path), every=1)
    metrics = writer._metrics
    assert metrics is not None
    for usage, free in ((gone, None), (lambda path: SimpleNamespace(free=5 if path == tmp_path else 0), 5)):
        monkeypatch.setattr(shutil, "disk_usage", usage)
        writer.add(taken(1), sums_of(1.0), None, 0.5)
        assert metrics.registry.get_sample_value("beit_run_disk_free_bytes") == free
    writer.close()


def test_what_reading_took_is_exported_with_the_steps(tmp_path: Path) -> None:
    counts.take()
    counts.give({"beit_data_read_bytes": {"store": 500}, "beit_storage_retries": {"cut": 2}})
    counts.bytes_read.add("store", 20)
    writer = a_recorder(RunFolder(tmp_path), every=1)
    metrics = writer._metrics
    assert metrics is not None
    writer.add(taken(1), sums_of(1.0), None, 0.5)
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


def test_a_port_in_use_does_not_stop_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        metrics = Metrics()
        got = metrics.serve(LoggingConfig(metrics_port=port))
        metrics.close()
    assert got not in (None, port)
    assert capsys.readouterr().out == f"metrics: port {port} is in use, so they are served at port {got}\n"


def test_only_this_host_can_ask_unless_told_otherwise() -> None:
    metrics = Metrics()
    port = metrics.serve(LoggingConfig(metrics_port=0))
    assert port is not None
    try:
        assert "beit_train_steps_total" in scrape(port)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=10)  # as good as another address of this host
    finally:
        metrics.close()


@pytest.mark.parametrize("address", ["192.0.2.1", "no such host", "a" * 70])
def test_an_address_of_another_host_is_named(address: str) -> None:
    said = rf"metrics_address: got '{address}', expected an address of this host.*0\.0\.0\.0 for the whole network"
    with pytest.raises(ConfigError, match=said):
        check_address("logging.metrics_address", address)


def test_an_address_that_was_this_hosts_is_named_too() -> None:
    with pytest.raises(ConfigError, match=r"metrics_address: got '192\.0\.2\.1', expected an address of this"):
        Metrics().serve(LoggingConfig(metrics_port=0, metrics_address="192.0.2.1"))


def test_the_endpoint_can_be_turned_off() -> None:
    assert Metrics().serve(LoggingConfig(metrics_port=None)) is None


@pytest.mark.parametrize("kind", tables())
def test_names_follow_prometheus_conventions(kind: str) -> None:
    table = tables()[kind]
    for metric in table:
        assert metric.name.startswith("beit_")
        assert not metric.name.endswith(("_total", "_info"))
        assert metric.help.endswith(".")
    assert len({metric.name for metric in table}) == len(table)
