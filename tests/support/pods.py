"""Pods of rendered manifests as processes of this machine: the same command, variables, files and signals.

There is no container: a mount path in an argument or a variable becomes the folder that stands for the volume, a
pod's host name becomes an address of the loopback interface, and the rendezvous has a port that is free here.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.kustomize import Rendered, Workload, expanded
from support.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
_ADDRESSES = "127.0.0.{}"
_GETENT = """#!/bin/sh
grep -qx "$2" "{names}"
"""


@dataclass
class Cluster:
    """One Job of rendered manifests, and what its pods share; at the end of a ``with`` block all are killed.

    Args:
        volumes: the folder that stands for each claim, by name, and for each host path.
        folder: for all else; not there yet.
    """

    rendered: Rendered
    job: Workload
    volumes: Mapping[str, Path]
    folder: Path
    ports: dict[str, str] = field(default_factory=dict)
    pods: list[Pod] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "names").touch()
        (self.folder / "bin").mkdir()
        getent = self.folder / "bin" / "getent"
        getent.write_text(_GETENT.format(names=self.folder / "names"))
        getent.chmod(0o755)
        if (port := self.job.environment.get("MASTER_PORT")) is not None:
            self.ports[port] = str(free_ports(1)[0])

    def start(self, index: int = 0) -> Pod:
        """The pod of an index, the first or its replacement."""
        self.pods.append(Pod(self, index, self.folder / f"pod-{len(self.pods) + 1}"))
        return self.pods[-1]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods:
            pod.kill()
            pod.temporary.cleanup()

    def address(self, word: str) -> str:
        """The address that a host name stands for; any other word as it is."""
        pods = range(self.job.spec["completions"]) if self.job.service is not None else ()
        names = {self.job.host_name(index): index for index in pods}
        return _ADDRESSES.format(11 + names[word]) if word in names else word

    def publish(self, index: int) -> None:
        """The headless Service, if there is one, names a pod, whether it is ready or not."""
        with (self.folder / "names").open("a") as names:
            names.write(self.address(self.job.host_name(index)) + "\n")

    def action(self, code: int) -> str:
        """What the Job makes of a container's exit code: ``Complete``, ``Count`` or the action of a rule."""
        if code == 0:
            return "Complete"
        for rule in self.job.spec["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if codes and codes["containerName"] == self.job.container["name"] and code in codes["values"]:
                return str(rule["action"])
        return "Count"


class Pod:
    """A running pod."""

    def __init__(self, cluster: Cluster, index: int, folder: Path) -> None:
        self._cluster, self.index = cluster, index
        folder.mkdir()
        self.temporary = tempfile.TemporaryDirectory()  # of a short name, as sockets lie there
        self._mounts = {**_mounts(cluster, folder), "/tmp": Path(self.temporary.name)}
        self._output = folder / "output"
        cluster.publish(index)
        container = cluster.job.container
        variables = self._variables()
        words = [expanded(word, variables["plain"]) for word in (*container["command"], *container["args"])]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [self._placed(word) for word in words],
                env=variables["placed"],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _variables(self) -> dict[str, dict[str, str]]:
        """The container's variables, as in the manifest and for this machine."""
        plain: dict[str, str] = {}
        for entry in self._cluster.job.container["env"]:
            plain[entry["name"]] = expanded(entry["value"], plain)
        placed = {
            name: self._placed(self._cluster.ports.get(v, self._cluster.address(v))) for name, v in plain.items()
        }
        image = {  # of the image: its programs, the package, and a /tmp of the pod's own
            "PATH": f"{self._cluster.folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self._mounts["/tmp"]),
        }
        if self._cluster.job.spec.get("completionMode") == "Indexed":
            image["JOB_COMPLETION_INDEX"] = str(self.index)
        return {"plain": plain, "placed": {**image, **placed}}

    def _placed(self, word: str) -> str:
        """Mount paths replaced by folders."""
        paths = "|".join(re.escape(path) for path in sorted(self._mounts, key=len, reverse=True))
        return re.sub(rf"(?<![\w./-])({paths})(?![\w.-])", lambda found: str(self._mounts[found[1]]), word)

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self._output.read_text()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """The exit code of its container."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"pod {self.index} did not end in {seconds:g} s:\n{self.output[-3000:]}"
            ) from None

    def delete(self) -> int:
        """SIGTERM to its first process; SIGKILL to all when the grace period is over. The exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(self._cluster.job.pod["terminationGracePeriodSeconds"])
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        try:
            first = psutil.Process(self._process.pid)
            members = [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _mounts(cluster: Cluster, folder: Path) -> dict[str, Path]:
    """The folder of each mount path. /dev/shm stays the machine's."""
    volumes = {volume["name"]: volume for volume in cluster.job.pod["volumes"]}
    found = {}
    for mount in cluster.job.container["volumeMounts"]:
        if mount["mountPath"] != "/dev/shm":
            found[mount["mountPath"]] = _volume(cluster, volumes[mount["name"]], folder)
    return found


def _volume(cluster: Cluster, volume: dict[str, Any], folder: Path) -> Path:
    if "persistentVolumeClaim" in volume:
        return cluster.volumes[volume["persistentVolumeClaim"]["claimName"]]
    if "hostPath" in volume:
        return cluster.volumes[volume["hostPath"]["path"]]
    place = folder / str(volume["name"])
    place.mkdir()
    if "configMap" in volume:
        for name, text in cluster.rendered.config_maps[volume["configMap"]["name"]].items():
            (place / name).write_text(text)
    elif "emptyDir" not in volume:
        raise NotImplementedError(volume)
    return place
