"""The folder of checkpoints: attempts, committing, finding the newest whole one, and what is kept.

A checkpoint is a folder ``step-SSSSSSSS.aAAAA`` written by one attempt (one start of the run). Its
``manifest.json`` is written last and is the commit: a folder without it does not exist. The manifest names
every file with size and sha256, so a damaged checkpoint is noticed and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from beit_dist.config import CheckpointConfig
from beit_dist.engine.checkpoint.files import (
    FragmentReader,
    commit_exclusively,
    file_fault,
    sync_folder,
    write_fragments,
    write_whole,
)
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.layout import (
    FORMAT_VERSION,
    MANIFEST,
    Saved,
    committed,
    folder_name,
    parse_folder_name,
    rank_records,
    sealed,
)
from beit_dist.engine.distributed import Agreement
from beit_dist.errors import CheckpointError

_log = logging.getLogger(__name__)


class SupersededError(CheckpointError):
    """A newer attempt runs in the same folder; this one must leave it alone."""

    exit_code = 1


class CheckpointStore:
    """Saves and restores the engine's state in ``folder``; every method is called by all ranks together.

    Args:
        folder: ``RUN/checkpoints``.
        settings: what to keep.
        agreement: the ranks' CPU group.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig, agreement: Agreement) -> None:
        self.folder = folder
        self._settings = settings
        self._agreement = agreement
        self._rank, self._world = agreement.ranks.rank, agreement.ranks.world
        self.attempt = 0
        self.passed_over = 0  # damaged checkpoints met while looking for a whole one

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank is the one that commits."""
        return self._rank == 0

    def begin_attempt(self) -> int:
        """Take the next attempt number by exclusive creation; the same number on every rank."""
        if self._rank == 0:
            attempts = self.folder / "attempts"
            attempts.mkdir(parents=True, exist_ok=True)
            number = self._newest_attempt()
            while not self.attempt:
                number += 1
                try:
                    (attempts / f"{number:06d}").touch(exist_ok=False)
                    self.attempt = number
                except FileExistsError:
                    continue
            sync_folder(attempts)
        self.attempt = self._agreement.from_rank_0(self.attempt)
        return self.attempt

    def newest_whole(self) -> Saved | None:
        """The newest checkpoint whose files are all whole; damaged ones are reported and renamed ``.bad``.

        The files are divided over the ranks for hashing; the ranks agree on the result.
        """
        while True:
            candidates = self._agreement.from_rank_0(committed(self.folder) if self._rank == 0 else None)
            if not candidates:
                return None
            saved: Saved = candidates[0]
            files = saved.manifest.get("files", [])
            faults = [] if files else ["its manifest is damaged"]
            for record in files[self._rank :: self._world]:
                fault = file_fault(saved.folder / record["file"], record["bytes"], record["sha256"])
                faults += [fault] if fault else []
            faults = [fault for found in self._agreement.gather(faults) for fault in found]
            if not faults:
                return saved
            self.passed_over += 1
            if self._rank == 0:
                _log.warning("checkpoint %s is damaged (%s); using the one before", saved.folder.name, faults[0])
                saved.folder.rename(saved.folder.with_name(f"{saved.folder.name}.bad"))

    def restore(self, saved: Saved, state: EngineState) -> None:
        """Fill the engine's state from a whole checkpoint, bit for bit, and publish it to the model."""
        version = saved.manifest.get("format")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{saved.folder}: got format {version}, expected {FORMAT_VERSION}")
        reader = FragmentReader(saved.folder, rank_records(saved))
        for fragment in state.held_fragments():
            reader.fill(fragment)
        state.publish(saved.manifest["updates"])

    def save(self, step: int, state: EngineState, facts: dict[str, Any]) -> bool:
        """Write and commit a checkpoint of ``step``; False when a rank could not write, which is logged.

        Args:
            step: optimizer steps attempted so far; a step that is already whole is not saved again.
            state: the engine's state.
            facts: what the manifest shall say besides: position, plan, configuration, versions.

        Raises:
            SupersededError: a newer attempt was started on this folder.
        """
        folder = self.folder / folder_name(step, self.attempt)
        exists = self._rank == 0 and any(saved.step == step for saved in committed(self.folder))
        if self._agreement.from_rank_0(exists):
            return True
        fault = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_fragments(folder, self._rank, state.saved_fragments())
        except OSError as error:
            fault = f"rank {self._rank}: {error}"
        faults = [found for found in self._agreement.gather(fault) if found]
        verdict = ""
        if self._rank == 0 and not faults:
            try:
                self._commit(folder, step, state, facts)
            except SupersededError as error:
                verdict = str(error)
            except OSError as error:
                faults = [f"rank 0: {error}"]
        verdict, faults = self._agreement.from_rank_0((verdict, faults))
        if verdict:
            raise SupersededError(verdict)
        if faults and self._rank == 0:
            _log.error("checkpoint of step %d was not saved: %s", step, faults[0])
            shutil.rmtree(folder, ignore_errors=True)
        return not faults

    def _commit(self, folder: Path, step: int, state: EngineState, facts: dict[str, Any]) -> None:
        files: list[dict[str, Any]] = []
        for rank in range(self._world):
            content = (folder / f"rank-{rank:05d}.json").read_bytes()
            record = json.loads(content)
            files.append({name: record[name] for name in ("file", "bytes", "sha256")})
            sha256 = hashlib.sha256(content).hexdigest()
            files.append({"file": f"rank-{rank:05d}.json", "bytes": len(content), "sha256": sha256})
        manifest = {
            "format": FORMAT_VERSION,
            "step": step,
            "attempt": self.attempt,
            "saved_at": time.time(),
            "world_size": self._world,
            "updates": state.updates,
            "files": files,
            **facts,
        }
        newest = self._newest_attempt()
        if newest > self.attempt:
            raise SupersededError(f"superseded by attempt {newest}: this run (attempt {self.attempt}) stops")
        commit_exclusively(folder / MANIFEST, sealed(manifest))
        sync_folder(self.folder)
        write_whole(self.folder / "latest", f"{folder.name}\n".encode())
        self._tidy()

    def _tidy(self) -> None:
        """Remove what need not be kept, and what older attempts left unfinished."""
        every = self._settings.keep_every_steps
        for saved in committed(self.folder)[self._settings.keep :]:
            if not (every and saved.step % every == 0):
                # Without its manifest a checkpoint does not exist: a removal cut short leaves no half one.
                (saved.folder / MANIFEST).unlink()
                shutil.rmtree(saved.folder, ignore_errors=True)
        for path in self.folder.glob("step-*"):
            name = parse_folder_name(path.name)
            if name and name[1] < self.attempt and not (path / MANIFEST).exists():
                shutil.rmtree(path, ignore_errors=True)

    def _newest_attempt(self) -> int:
        attempts = self.folder / "attempts"
        return max((int(name) for name in os.listdir(attempts) if name.isdigit()), default=0)
