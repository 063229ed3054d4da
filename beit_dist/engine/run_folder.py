"""The run folder: the resolved recipe, what ran where, one line of numbers per step, and how the run ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

import beit_dist
from beit_dist.config.reading import Section
from beit_dist.errors import ConfigError, UserError
from beit_dist.shards.manifest import MANIFEST_NAME
from beit_dist.storage.access import Access
from beit_dist.storage.durable import check_takes_files, writing
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place

DONE, PREEMPTED, FAILED = MARKERS = ("DONE", "PREEMPTED", "FAILED")
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
CLOCKS = 10.0
"""Seconds by which the clocks of two hosts may differ."""


class RunFolder:
    """``RUN``. Only rank 0 writes, except for ``FAILED``, which whichever rank fails first creates.

    Args:
        where: the folder's path or URL.
        access: how a URL is reached.

    Attributes:
        place: the folder. Checkpoints, the recipe and markers go there.
        path: the same if it is local. Otherwise a folder of this host for what grows line by line or is written
            by other packages, which a store cannot take: the lines of numbers go with each checkpoint.
        begun: whether this start has made it its own. Before, a start is refused and leaves nothing.
        attempt: the number of this start; 0 until it has one.
    """

    def __init__(self, where: str | Path, access: Access | None = None) -> None:
        self.place = open_place(where, access)
        self.path = self.place.path if self.place.is_local else _scratch(str(self.place))
        self.begun = False
        self.attempt = 0

    @property
    def checkpoints(self) -> Place:
        """Folder of the checkpoints."""
        return self.place / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / METRICS

    @property
    def validation(self) -> Path:
        """One JSON object per measurement of the held-out loss."""
        return self.path / VALIDATION

    @property
    def ranks(self) -> Path:
        """What single ranks leave for diagnosis; each rank writes its own."""
        return self.path / "ranks"

    def create(self) -> None:
        """Make the folder and those in it."""
        self.checkpoints.make()
        for path in (self.ranks, self.path / "pictures"):
            path.mkdir(parents=True, exist_ok=True)

    def check_writable(self) -> None:
        """Look whether this rank can write into the folder, or reach its store; nothing is left in it.

        Raises:
            ConfigError: it cannot write, or the folder is a data set's.
            StorageError: the store refuses, or does not answer.
        """
        local, folders = self.place.is_local, [self.path, self.ranks]
        # of a store the list is asked for in any case: it shows whether it can be reached
        if os.path.isfile(self.path / MANIFEST_NAME) if local else MANIFEST_NAME in self.place.list():
            raise ConfigError("run", str(self.place), "a folder of the run's own, but this one holds a data set")
        if local:
            folders += [self.checkpoints.path, self.checkpoints.path / "attempts"]
        there = [folder for folder in folders if folder.exists()]
        try:
            # each, in case a copy, or a part of it, belongs to somebody else
            for folder in there or [next(above for above in self.path.absolute().parents if above.exists())]:
                check_takes_files(folder)
        except OSError as error:
            raise ConfigError(
                "run",
                str(self.path),
                "a folder that can be written to",
                f"{error.strerror} ({error.filename}): choose another, or change its owner or mount.",
            ) from None

    def remove_markers(self) -> None:
        """A new attempt begins: how the one before ended is no longer the truth."""
        for marker in MARKERS:
            self.place.remove(marker)

    def mark(self, marker: str, **facts: Any) -> None:
        """Leave the marker of a start that ended well."""
        self.place.write(marker, _as_bytes(facts))

    @property
    def has_failed(self) -> bool:
        """Whether a rank of this start has left ``FAILED``; of a run in a store that is not looked up."""
        return self.place.is_local and (self.path / FAILED).exists()

    def mark_failed(self, since: float, **facts: Any) -> dict[str, Any] | None:
        """Leave ``FAILED`` unless another rank has; what that one says, or None when this is the first.

        Args:
            since: Unix time at which this start began; an older marker is of another start and is replaced.
            facts: what to say.
        """
        if not self.place.is_local:
            return self._mark_failed_remotely(since, facts)
        path = self.path / FAILED
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            first = _read_marker(path)
            if first is None or _is_of_this_start(first, since, facts):
                return first
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError:  # the folder is not there yet, or the disk is what failed
            return None
        with contextlib.suppress(OSError), os.fdopen(descriptor, "wb") as file:  # a full disk: the name is there
            file.write(_as_bytes(facts))
        return None

    def _mark_failed_remotely(self, since: float, facts: dict[str, Any]) -> dict[str, Any] | None:
        content = _as_bytes({**facts, "id": uuid.uuid4().hex})
        try:
            if not self.place.create(FAILED, content):
                first: dict[str, Any] = json.loads(self.place.read(FAILED))
                if _is_of_this_start(first, since, facts):
                    return first
                self.place.write(FAILED, content)
        except (OSError, ValueError, UserError):  # the store may be what failed
            return None
        return None

    def keep_files_of(self, rank: int) -> None:
        """Upload what a rank has left for diagnosis, as far as that goes: its host may soon be gone."""
        if self.place.is_local:
            return
        with contextlib.suppress(OSError, UserError):
            for path in self.ranks.glob(f"rank-{rank:05d}.*"):
                (self.place / "ranks").write(path.name, path.read_bytes())

    @property
    def copies(self) -> dict[str, Path]:
        """Files of numbers that go with each checkpoint, as the run's own folder cannot take them."""
        if self.place.is_local:
            return {}
        return {path.name: path for path in (self.metrics, self.validation) if path.exists()}

    def take_copies(self, checkpoint: Place | None) -> None:
        """Begin with the files of numbers of ``checkpoint``, or with none: this host's may be of another start."""
        if self.place.is_local:
            return
        for path in (self.metrics, self.validation):
            path.unlink(missing_ok=True)
            if checkpoint is not None and checkpoint.exists(path.name):
                with writing(path) as file:
                    for piece in checkpoint.chunks(path.name):
                        file.write(piece)

    def write_config(self, config: Section) -> None:
        """``config.yaml``: the recipe with every default."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        self.place.write("config.yaml", text.encode())

    def write_run(self, facts: dict[str, Any]) -> None:
        """``run.json``: versions, hosts, process ids and whatever else ``facts`` say."""
        self.place.write("run.json", (json.dumps(facts, indent=1) + "\n").encode())

    def forget_steps_after(self, step: int) -> None:
        """Rewrite the files of numbers without the lines past ``step`` (and without a line cut short).

        A file is replaced, so a process of an older attempt that still holds it writes into nothing.
        """
        for path in (self.metrics, self.validation):
            if path.exists():
                _keep_lines_up_to(step, path)


def _keep_lines_up_to(step: int, path: Path) -> None:
    with path.open("rb") as old, writing(path) as new:
        for line in old:
            try:
                keep = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                keep = False
            if keep and line.endswith(b"\n"):
                new.write(line)


def _as_bytes(facts: dict[str, Any]) -> bytes:
    facts = {"time": time.time(), "host": socket.gethostname(), **facts}
    return (json.dumps(facts, indent=1) + "\n").encode()


def _scratch(url: str) -> Path:
    """This user's folder for a run at ``url``; the same at each start, on a host that has not been set up anew."""
    name = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"beit_dist-{os.getuid()}" / name


def _is_of_this_start(marker: dict[str, Any], since: float, own: dict[str, Any]) -> bool:
    if marker.get("rank") == own.get("rank"):  # a rank fails only once; the clock may have been put back since
        return False
    clocks = 0.0 if marker.get("host") == socket.gethostname() else CLOCKS
    return float(marker.get("time", 0.0)) >= since - clocks


def _read_marker(path: Path) -> dict[str, Any] | None:
    for _ in range(20):
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        except ValueError:  # its rank is still writing
            time.sleep(0.05)
        except OSError:
            return None
    return None


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on, for ``run.json`` and the manifests."""
    import deepspeed
    import numpy as np
    import torch

    return {
        "beit_dist": beit_dist.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "numpy": np.__version__,
    }


def _commit() -> str:
    """The source's git commit, or nothing when it is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
