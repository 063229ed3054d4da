"""Shards and run folder in a store behind a network that fails: killed, gone on with elsewhere, as a local run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.fault_proxy import Fault, FaultProxy
from support.object_store import ObjectStore

from beit_dist.checkpoints.layout import committed
from beit_dist.errors import AccessError
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place
from beit_dist.train import main
from beit_dist.weights.stored import load_weights

pytestmark = pytest.mark.slow

SETTINGS = ["loader.workers=0", "loader.block_samples=8", "steps=20", "checkpoint.every_steps=3"]
NUMBERS = ("step", "samples", "loss", "accuracy", "lr", "grad_norm", "masked", "bad", "skipped", "batch")
FAULTS = [
    Fault("stall", method="GET", path="/v0", times=1, after=100, seconds=20),
    Fault("slow_down", chance=0.08),
    Fault("server_error", chance=0.05),
    Fault("reset", chance=0.05),
    Fault("lost", method="PUT", chance=0.05),
    Fault("cut", method="GET", chance=0.05, after=100),
    Fault("whole", method="GET", chance=0.1),
]


@pytest.fixture
def hosts() -> Iterator[Path]:
    """Where the hosts' temporary files are; sockets lie there, whose paths must be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def environment(
    object_store: ObjectStore, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, hosts: Path
) -> None:
    """Ranks find the store behind the proxy, and have a folder of temporary files of their own."""
    for name, value in object_store.environment(fault_proxy.url).items():
        monkeypatch.setenv(name, value)
    use_host(monkeypatch, hosts, "first")


def use_host(monkeypatch: pytest.MonkeyPatch, hosts: Path, name: str) -> None:
    """Have what a host keeps in its temporary files."""
    (hosts / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(hosts / name))


def lines(place: Place) -> list[tuple[Any, ...]]:
    """The numbers of each step."""
    found = [json.loads(line) for line in place.read("metrics.jsonl").splitlines()]
    return [tuple(line[name] for name in NUMBERS) for line in found]


def kill_after(place: Place, step: int, process: Any) -> None:
    """Kill the launcher and its ranks once a checkpoint of ``step`` or a later one is there."""
    deadline = time.monotonic() + 120
    while not any(saved.step >= step for saved in committed(place / "checkpoints")):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)
    victims = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in victims:
        victim.kill()
    process.communicate()


def upload(folder: Path, url: str) -> str:
    """Copy a data set into the store; its URL."""
    for path in folder.rglob("*.*"):
        open_place(url).write(str(path.relative_to(folder)), path.read_bytes())
    return url


def scrape(process: subprocess.Popen[str], place: Place, attempt: int) -> str:
    """What the metrics endpoint of this attempt said last before the run ended."""
    said, port = "", None
    while process.poll() is None:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            if port is None:
                facts = json.loads(place.read("run.json"))
                port = facts["metrics_port"] if facts["attempt"] == attempt else None
            else:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    said = answer.read().decode()
    return said


def total(said: str, metric: str) -> float:
    """Sum of a counter over its labels."""
    return sum(float(number) for number in re.findall(rf"^{metric}_total{{.*}} (\S+)$", said, re.MULTILINE))


@pytest.mark.usefixtures("environment")
def test_a_run_in_a_store_that_fails_is_killed_and_ends_on_another_host_as_a_local_run_does(
    new_run: Callable[..., Any],
    object_store: ObjectStore,
    fault_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    hosts: Path,
    tmp_path: Path,
    small_data: Path,
) -> None:
    whole = new_run("whole", ranks=2, overrides=SETTINGS)
    code, output = whole.finish()
    assert code == 0, output

    url = f"s3://{object_store.new_bucket()}/runs/one"
    place = open_place(url)
    data = upload(small_data, f"{url}/shards")
    settings = [*SETTINGS, f"run={url}", f"data={data}", "storage.read_seconds=5", "logging.metrics_port=0"]
    run = new_run("unused", ranks=2, overrides=[*settings, "loader.workers=1"])
    fault_proxy.inject(*FAULTS)
    kill_after(place, 6, run.start())
    shutil.rmtree(hosts / "first")
    use_host(monkeypatch, hosts, "second")
    process = run.start()
    said = scrape(process, place, attempt=2)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "resumed from step-" in output
    assert total(said, "beit_storage_retries") > 0
    assert total(said, "beit_data_read_bytes") > 0
    assert 'beit_data_read_bytes_total{source="store"}' in said
    injected = fault_proxy.injected
    assert len(injected) >= 4, injected
    fault_proxy.inject()

    assert place.exists("DONE")
    assert not place.exists("FAILED")
    assert json.loads(place.read("run.json"))["attempt"] == 2
    assert lines(place) == whole.numbers()
    newest = committed(place / "checkpoints")[0]
    files = {f["file"]: f["sha256"] for f in newest.manifest["files"] if f["file"].endswith(".safetensors")}
    assert files == whole.final_files()
    # What the killed attempt left unfinished is gone; three whole ones would be kept, the recipe says two.
    assert len([name for name in place.list("checkpoints") if name.startswith("step-")]) == 2

    there, here = load_weights(url)[0], load_weights(whole.folder)[0]
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert there.keys() == here.keys()

    secret = object_store.secret.encode()
    client, bucket = object_store.client(), url.split("/")[2]
    for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
        assert secret not in client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read(), entry["Key"]
    for folder, _, names in itertools.chain(os.walk(tmp_path), os.walk(hosts)):
        files = [Path(folder) / name for name in names]
        assert not any(secret in file.read_bytes() for file in files if file.is_file())
    assert object_store.secret not in output


@pytest.mark.usefixtures("environment")
def test_wrong_credentials_are_one_clear_error(
    new_run: Callable[..., Any], object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    run = new_run("unused", overrides=[*SETTINGS, f"run=s3://{object_store.new_bucket()}/run"])
    code, output = run.finish()
    assert code == 2, output
    assert output.count("Check the credentials in the environment") == 1
    assert "not-the-secret-at-all" not in output
    assert "Traceback" not in output


@pytest.mark.usefixtures("environment")
def test_shards_that_the_credentials_may_not_read_are_refused_before_anything_starts(
    new_run: Callable[..., Any], object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    data = f"s3://{object_store.new_bucket()}/shards"
    # Settings of its own: this process keeps a client for each, with the environment of its first use.
    run = new_run("run", overrides=[*SETTINGS, f"data={data}", "storage.retry_seconds=7"])
    with pytest.raises(AccessError, match=rf"{data}/manifest\.json: .*Check the credentials") as error:
        main([word for word in run.command()[2:] if word != f"data={run.data}"])
    assert "not-the-secret-at-all" not in str(error.value)
    assert not run.folder.exists()
