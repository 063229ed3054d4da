"""What a worker tells: numbers for Prometheus, lines in a log, and why images were left out."""

from __future__ import annotations

import os
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from beit_dist.errors import ConfigError
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.retries import counts
from beit_dist.tokenizing import metrics as metrics_module
from beit_dist.tokenizing import progress as progress_module
from beit_dist.tokenizing import worker as worker_module
from beit_dist.tokenizing.metrics import STAGES, Exporter, Metrics
from beit_dist.tokenizing.parts import Part
from beit_dist.tokenizing.rejected import Rejected, summary
from beit_dist.tokenizing.sources import SourceList
from beit_dist.tokenizing.worker import Worker

Values = dict[tuple[str, str], float]


def parsed(text: str) -> Values:
    """(name, the label that is not the worker's) to value; every series must be worker 1's."""
    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("worker") == "1"
            found[sample.name, next(iter(labels.values()), "")] = sample.value
    return found


def test_a_workers_numbers_are_those_of_its_work(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job, sources = bench.job(out)
    entries = {entry.sample_id: Path(entry.place) for entry in SourceList(LocalPlace(out), 99).read(0)}
    entries[5].write_bytes(b"?" * entries[5].stat().st_size)  # of shard 1: worker 1's
    metrics, file = Metrics(1), tmp_path / "tokenize.prom"

    def work(decoders: int) -> Values:
        with Exporter(metrics, None, file):
            options: dict[str, Any] = {"index": 1, "count": 2, "decoders": decoders, "max_rejected": 9}
            Worker(Part("", LocalPlace(out), job, sources), bench.encoder, metrics=metrics, **options).run()
        return parsed(file.read_text())

    found = work(decoders=1)
    for name, label, value in (
        ("images_total", "", 5),  # shards 1 and 3, of 4 and 1
        ("images_planned", "", 5),
        ("images_rejected_total", "not_an_image", 1),
        ("shards_finished", "", 2),
        ("shards_planned", "", 2),
    ):
        assert found[f"beit_tokenize_{name}", label] == value, name
    assert all(found["beit_tokenize_stage_seconds_total", stage] > 0 for stage in STAGES)
    assert found["beit_tokenize_last_progress_timestamp_seconds", ""] == pytest.approx(
        os.stat(file).st_mtime, abs=60
    )
    assert [path.name for path in tmp_path.glob("tokenize*")] == ["tokenize.prom"]
    metrics = Metrics(1)
    again = work(decoders=0)
    assert again["beit_tokenize_images_total", ""] == 5  # an earlier start's count as done
    assert ("beit_tokenize_images_rejected_total", "not_an_image") not in again


def test_retries_of_the_last_commit_count(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, sources = bench.job(tmp_path)
    metrics, commit = Metrics(1), worker_module.write_commit

    def slowed(*arguments: Any) -> None:
        commit(*arguments)
        counts.add("throttled")

    monkeypatch.setattr(worker_module, "write_commit", slowed)
    counts.take()
    Worker(
        Part("", LocalPlace(tmp_path), job, sources),
        bench.encoder,
        index=0,
        count=1,
        decoders=0,
        max_rejected=0,
        metrics=metrics,
    ).run()
    labels = {"worker": "1", "cause": "throttled"}
    assert metrics.registry.get_sample_value("beit_storage_retries_total", labels) == sources.shards


def test_the_endpoint_serves_and_a_port_in_use_does_not_stop_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        with Exporter(Metrics(1), wanted, None) as exporter:
            assert exporter.port not in (None, wanted)
            with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as answer:
                found = parsed(answer.read().decode())
    assert found["beit_tokenize_stage_seconds_total", "encode"] == 0
    assert f"port {wanted} is in use, so they are served at port {exporter.port}" in capsys.readouterr().out


def test_only_this_host_can_ask_unless_told_otherwise() -> None:
    with Exporter(Metrics(1), 0, None) as exporter, pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", exporter.port), timeout=10)
    with Exporter(Metrics(1), 0, None, "0.0.0.0") as exporter:
        socket.create_connection(("127.0.0.2", exporter.port), timeout=10).close()
    with pytest.raises(
        ConfigError, match=r"--metrics-address: got '192\.0\.2\.1', expected an address of this host"
    ):
        Exporter(Metrics(1), 0, None, "192.0.2.1")


def test_a_file_that_cannot_be_written_any_more_does_not_stop_the_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with Exporter(Metrics(1), None, tmp_path / "x.prom"):
        monkeypatch.setattr(metrics_module, "write_to_textfile", full)
    assert "No space left on device" in caplog.text
    with pytest.raises(ConfigError, match="--metrics-textfile"):
        Exporter(Metrics(1), None, tmp_path / "x.txt")


def test_a_log_gets_a_line_now_and_then(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "_LINE_SECONDS", -1.0)
    bench.work(tmp_path / "out", 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("worker 1 of 2: 5 of 5 images, ")
    assert lines[-1].endswith("images/s, 00:00 left")


def test_the_summary_counts_by_class_and_gives_examples() -> None:
    rejected = [Rejected(n, f"{n}.jpg", "OSError: truncated", "damaged") for n in range(5)]
    rejected.append(Rejected(9, "9.png", "1×1 px: a side shorter than 8 px", "too_small"))
    assert summary(rejected) == [
        "rejected, damaged: 5",
        "  0.jpg: OSError: truncated",
        "  1.jpg: OSError: truncated",
        "  2.jpg: OSError: truncated",
        "  ...",
        "rejected, too small: 1",
        "  9.png: 1×1 px: a side shorter than 8 px",
    ]
    assert summary([]) == []
    hostile = Rejected(9, "a\n\x1b[2J\udcff.jpg", "empty", "not_an_image")
    assert summary([hostile])[1] == r"  a\n\x1b[2J\udcff.jpg: empty"
