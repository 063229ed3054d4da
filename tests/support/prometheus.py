"""A real Prometheus with the repository's configuration and rules, but in a hurry."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.ports import free_ports

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "monitoring" / "prometheus"
_DURATION = re.compile(r"(?P<before>\[|for: |offset )(?P<number>\d+)(?P<unit>[mh])\b")
_SECONDS = re.compile(r"(?P<before>_seconds|:seconds|\b4 \*)(?P<operator> > | )(?P<number>\d{3,})\b")


def installed(program: str) -> str:
    """Its path; the test skips where it is missing."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is missing: apt-get install prometheus")
    return found


def hurried(rules: str, times: int) -> str:
    """The text of a file of rules in which every time is shorter, and nothing else is another.

    Times are the windows (``[10m]``), ``offset``, ``for``, and the seconds that a metric in seconds is compared
    with or that are foreseen (``> 900``, ``4 * 3600``).
    """

    def shorter(found: re.Match[str]) -> str:
        milliseconds = int(found["number"]) * {"m": 60_000, "h": 3_600_000}[found["unit"]] // times
        return f"{found['before']}{milliseconds}ms"

    def fewer(found: re.Match[str]) -> str:
        return f"{found['before']}{found['operator']}{int(found['number']) / times:g}"

    return _SECONDS.sub(fewer, _DURATION.sub(shorter, rules))


class Server:
    """A running Prometheus.

    Attributes:
        url: where it listens.
        folder: of its configuration, its targets and its log.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    def asked(self, path: str, **parameters: str) -> Any:
        """What the API answers; an error of the query fails the test with its text."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{parameters}: {error.read().decode()}")

    def is_ready(self) -> bool:
        """Whether it answers queries; it says 503 while it reads its data."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=10):
                return True
        except OSError:
            return False

    def firing(self, run: str) -> set[str]:
        """Names of the alerts that fire for a run."""
        found = self.asked("query", query=f'ALERTS{{alertstate="firing",run="{run}"}}')["result"]
        return {series["metric"]["alertname"] for series in found}

    def target(self, job: str, run: str, port: int) -> Path:
        """Announce an endpoint as a job of SLURM does; the file that does it."""
        place = self.folder / "targets" / job / f"{port}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        labels = {"run": run, "slurm_job_id": "7"}
        unfinished = place.with_suffix(".new")
        unfinished.write_text(json.dumps([{"targets": [f"127.0.0.1:{port}"], "labels": labels}]))
        return unfinished.rename(place)

    def log(self) -> str:
        """What it has written."""
        return (self.folder / "log").read_text()


@contextlib.contextmanager
def running(folder: Path, times: int = 1) -> Iterator[Server]:
    """A server with our configuration that scrapes twice a second.

    Args:
        folder: where it keeps everything.
        times: how much shorter than committed the times of its rules are.
    """
    program, port = installed("prometheus"), free_ports(1)[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("rules.yaml", "alerts.yaml"):
        text = (FOLDER / name).read_text()
        (folder / name).write_text(text if times == 1 else hurried(text, times))
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    for scraped in config["scrape_configs"]:
        for found in scraped["file_sd_configs"]:
            found["refresh_interval"] = "1s"
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            server = Server(f"http://127.0.0.1:{port}", folder)
            until(server.is_ready, "Prometheus")
            yield server
        finally:
            process.terminate()


def until(
    holds: Callable[[], Any], what: str, seconds: float = 120, watched: Callable[[], None] | None = None
) -> Any:
    """Ask again and again until the answer is true, and return it.

    Args:
        what: is waited for, told where it does not come in so many ``seconds``.
        watched: called each time; it fails where something happens that must not.
    """
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        if watched is not None:
            watched()
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s for {what}")
        time.sleep(0.2)
    return found
