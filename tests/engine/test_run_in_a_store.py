"""A run folder in a store behind a network that fails: killed, gone on with elsewhere, equal to a local run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.fault_proxy import Fault, FaultProxy
from support.object_store import ObjectStore

from beit_dist.engine.checkpoint.layout import committed
from beit_dist.engine.checkpoint.weights import load_weights
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place

pytestmark = pytest.mark.slow

SETTINGS = ["loader.workers=0", "steps=20", "checkpoint.every_steps=3"]
NUMBERS = ("step", "samples", "loss", "accuracy", "lr", "grad_norm", "masked", "bad", "skipped", "batch")
FAULTS = [
    Fault("slow_down", chance=0.08),
    Fault("server_error", chance=0.05),
    Fault("reset", chance=0.05),
    Fault("lost", method="PUT", chance=0.05),
    Fault("cut", method="GET", chance=0.05, after=100),
    Fault("whole", method="GET", chance=0.1),
]


@pytest.fixture
def environment(
    object_store: ObjectStore, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks find the store behind the proxy, and have a folder of temporary files of their own."""
    for name, value in object_store.environment(fault_proxy.url).items():
        monkeypatch.setenv(name, value)
    use_host(monkeypatch, tmp_path, "first")


def use_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Have what a host keeps in its temporary files."""
    (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))


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


@pytest.mark.usefixtures("environment")
def test_a_run_in_a_store_that_fails_is_killed_and_ends_on_another_host_as_a_local_run_does(
    new_run: Callable[..., Any],
    object_store: ObjectStore,
    fault_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = new_run("whole", ranks=2, overrides=SETTINGS)
    code, output = whole.finish()
    assert code == 0, output

    url = f"s3://{object_store.new_bucket()}/runs/one"
    place = open_place(url)
    run = new_run("unused", ranks=2, overrides=[*SETTINGS, f"run={url}", "storage.read_seconds=5"])
    fault_proxy.inject(*FAULTS)
    kill_after(place, 6, run.start())
    shutil.rmtree(tmp_path / "first")
    use_host(monkeypatch, tmp_path, "second")
    code, output = run.finish()
    assert code == 0, output
    assert "resumed from step-" in output
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
    for folder, _, names in os.walk(tmp_path):
        assert not any(secret in (Path(folder) / name).read_bytes() for name in names)
    assert object_store.secret not in output


@pytest.mark.usefixtures("environment")
def test_wrong_credentials_are_one_clear_error(
    new_run: Callable[..., Any], object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    run = new_run("unused", overrides=[*SETTINGS, f"run=s3://{object_store.new_bucket()}/run"])
    code, output = run.finish(seconds=60)
    assert code == 2, output
    assert output.count("Check the credentials in the environment") == 1
    assert "not-the-secret-at-all" not in output
    assert "Traceback" not in output
