"""The folder of checkpoints: attempts, saving beside the training, finding the newest whole one, what is kept.

A checkpoint is a folder ``step-SSSSSSSS.aAAAA`` written by one attempt (one start of the run). Its
``manifest.json`` is written last and is the commit: a folder without it does not exist. The manifest names
every file with size and sha256, so a damaged checkpoint is noticed and the one before is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beit_dist.checkpoints.files import file_fault, write_copy
from beit_dist.checkpoints.image import FileImage
from beit_dist.checkpoints.layout import (
    AVERAGE,
    FORMAT_VERSION,
    MANIFEST,
    Saved,
    committed,
    folder_name,
    rank_records,
    role_digests,
    sealed,
    summed,
)
from beit_dist.checkpoints.ranges import FragmentReader
from beit_dist.config.run import CheckpointConfig
from beit_dist.engine.checkpoint.attempts import Attempts, SupersededError
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.keeping import remove, remove_old, set_aside
from beit_dist.engine.checkpoint.writing import FAILED, Writing
from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.errors import CheckpointError
from beit_dist.storage.durable import leftovers, sync_folder
from beit_dist.storage.place import Place

_log = logging.getLogger(__name__)
_LONGEST_POLL = 1.0
_POLL = 0.02  # seconds between looks for the other ranks' files; the first looks only, later ones are rarer


@dataclass(frozen=True)
class SaveResult:
    """How a save ended, the same on every rank."""

    step: int
    fault: str
    """What went wrong; empty when the checkpoint is whole."""
    seconds: float
    """From the copy to the commit."""

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is whole."""
        return not self.fault


class CheckpointStore:
    """Saves and restores the engine's state in ``folder``; every method is called by all ranks together.

    Args:
        folder: ``RUN/checkpoints``.
        settings: what to keep.
        agreement: the ranks' CPU group.
    """

    def __init__(self, folder: Place, settings: CheckpointConfig, agreement: Agreement) -> None:
        self.folder = folder
        self._settings = settings
        self._agreement = agreement
        self._rank, self._world = agreement.ranks.rank, agreement.ranks.world
        self._attempts = Attempts(folder)
        self._stale: list[Path] = []  # temporary files that killed writers had left before this attempt
        self.passed_over = 0  # damaged checkpoints met while looking for a whole one
        self._image: FileImage | None = None  # memory for the copies, kept between saves
        self._preparing: threading.Thread | None = None
        self._writing: Writing | None = None
        self._whole_step: int | None = None  # the last step of this run that is known to be whole
        self._resumed_from: str | None = None

    @property
    def rank(self) -> int:
        """This rank; rank 0 commits."""
        return self._rank

    @property
    def attempt(self) -> int:
        """The number of this start of the run; 0 before ``begin_attempt``."""
        return self._attempts.number

    def begin_attempt(self, seen: int | None = None, step: int | None = None) -> int:
        """Take the next attempt number by exclusive creation; the same number on every rank.

        Args:
            seen: the newest number when this start looked at the run folder.
            step: of the newest checkpoint then; 0 if there was none.

        Raises:
            SupersededError: another start has taken a number since.
        """
        superseded = ""
        if self._rank == 0:
            try:
                self._attempts.begin(seen, step)
            except SupersededError as error:
                superseded = str(error)
            if self.folder.is_local:
                folder = self.folder.path
                places = (folder, self._attempts.place.path, folder.parent)
                self._stale = [file for place in places for file in leftovers(place)]
        self._attempts.number, superseded = self._agreement.from_rank_0((self.attempt, superseded))
        if superseded:
            raise SupersededError(superseded)
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
            faults = [] if files else ["its manifest is damaged, or was cut short"]
            for record in files[self._rank :: self._world]:
                fault = file_fault(saved.folder, record["file"], record["bytes"], record["sha256"])
                faults += [fault] if fault else []
            faults = [fault for found in self._agreement.gather(faults) for fault in found]
            if not faults:
                return saved
            self.passed_over += 1
            if self._rank == 0:
                instead = (
                    "using the one before"
                    if len(candidates) > 1
                    else "none is left, so the run starts from the beginning"
                )
                _log.warning("checkpoint %s is damaged (%s); %s", saved.folder.name, faults[0], instead)
                set_aside(saved.folder)

    def restore(self, saved: Saved, state: EngineState) -> None:
        """Fill the engine's state from a whole checkpoint, bit for bit, and publish it to the model.

        An average that the checkpoint has and the run does not keep, or the reverse, is left alone.
        """
        version = saved.manifest.get("format")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{saved.folder}: got format {version}, expected {FORMAT_VERSION}")
        reader = FragmentReader(saved.folder, rank_records(saved))
        expected = saved.manifest["state_digests"]
        absent = {AVERAGE} - set(expected)
        for fragment in state.held_fragments():
            if fragment.role not in absent:
                reader.fill(fragment)
        own = role_digests(fragment for fragment in state.saved_fragments() if fragment.role not in absent)
        digests = summed(self._agreement.gather(own))
        if any(expected[role] != digest for role, digest in digests.items()):
            raise CheckpointError(
                f"{saved.folder}: the state read from it has digests {digests}, expected {expected}; "
                "this is a fault of the program"
            )
        state.publish(saved.manifest["updates"])
        state.loss_scale = saved.manifest["loss_scale"]
        self._whole_step, self._resumed_from = saved.step, saved.folder.name

    def prepare(self, state: EngineState, device: torch.device) -> None:
        """Reserve addresses for the copies, and no memory yet.

        Args:
            state: what will be saved.
            device: where it lies.
        """
        image = self._image = FileImage(state.saved_fragments())

        def find() -> None:
            image.find_memory()
            if device.type == "cuda":
                image.pin(device)

        self._preparing = threading.Thread(target=find, name="checkpoint-memory", daemon=True)

    def find_memory(self) -> None:
        """Have the system find the memory for the copies, in a thread: the first save then need not wait for it.

        To be called after the first step, which needs much new memory itself and would be held up. Further calls
        do nothing.
        """
        if self._preparing is not None and self._preparing.ident is None:
            self._preparing.start()

    def begin_save(
        self,
        step: int,
        state: EngineState,
        facts: dict[str, Any],
        copies: Mapping[str, Path] | None = None,
        *,
        urgent: bool = False,
    ) -> None:
        """Copy the state to host memory and write it in a thread, beside the training.

        Args:
            step: optimizer steps attempted so far; a step that is already whole is not saved again.
            state: the engine's state.
            facts: what the manifest shall say besides: position, plan, configuration, versions.
            copies: local files that rank 0 saves with the state, by their name in the checkpoint.
            urgent: nothing is trained meanwhile, so the writing need not give way to anything.

        Raises:
            RuntimeError: the save before was not waited for.
        """
        if self._writing is not None:
            raise RuntimeError("begin_save() before the finish_save() of the one before")
        if step == self._whole_step:
            return
        manifest = {
            "format": FORMAT_VERSION,
            "step": step,
            "attempt": self.attempt,
            "resumed_from": self._resumed_from,
            "world_size": self._world,
            "updates": state.updates,
            "loss_scale": state.loss_scale,
            **facts,
        }
        if self._preparing is not None and self._preparing.ident is not None:
            self._preparing.join()
        self._preparing = None
        fragments = state.saved_fragments()
        if self._image is None or not self._image.fits(fragments):
            self._image = FileImage(fragments)
        self._image.take(fragments)
        folder = self.folder / folder_name(step, self.attempt)
        deadline = time.monotonic() + self._settings.timeout_seconds

        def commit() -> None:
            self._wait_for_others(folder, deadline)
            self.commit(folder, manifest, copies or {})

        self._writing = Writing(folder, step, self._rank, self._image, commit, urgent=urgent)
        self._writing.start()

    @property
    def is_saving(self) -> bool:
        """Whether a save was begun and not yet waited for."""
        return self._writing is not None

    @property
    def has_written(self) -> bool:
        """Whether this rank's part of the save that was begun is over; on rank 0 that includes the commit."""
        return self._writing is not None and not self._writing.is_alive()

    def finish_save(self) -> SaveResult | None:
        """Wait for the save in flight and agree on how it ended; None when there is none.

        Raises:
            SupersededError: a newer attempt was started on this folder.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        writing.join()
        faults = [fault for fault in self._agreement.gather(writing.fault) if fault]
        superseded = self._agreement.from_rank_0(writing.superseded)
        if superseded:
            if self._rank == 0 and not writing.folder.exists(MANIFEST):
                remove(self.folder, writing.folder.name)  # the newer attempt may have tidied up already
            raise SupersededError(superseded)
        if faults and self._rank == 0:
            _log.error("checkpoint of step %d was not saved: %s", writing.step, faults[-1])
            remove(self.folder, writing.folder.name)
        if not faults:
            self._whole_step = writing.step
        seconds = self._agreement.from_rank_0(writing.seconds)
        # Rank 0's own fault is mostly that it missed a rank's file: what that rank says is the cause.
        return SaveResult(writing.step, faults[-1] if faults else "", seconds)

    def _wait_for_others(self, folder: Place, deadline: float) -> None:
        """Rank 0: wait until every rank has written into ``folder``.

        Raises:
            OSError: a rank has given up, or has written nothing by the deadline.
            SupersededError: a newer attempt has begun.
        """
        pause = _POLL
        while missing := self.missing(folder):
            if time.monotonic() > deadline:
                limit = self._settings.timeout_seconds
                raise TimeoutError(
                    f"ranks {missing[:8]} wrote nothing within checkpoint.timeout_seconds={limit:g}"
                )
            if pause >= _LONGEST_POLL:  # a newer attempt may have removed what they wrote, while this host hung
                self.refuse_if_superseded()
            time.sleep(pause)
            pause = min(_LONGEST_POLL, pause * 1.5)

    def missing(self, folder: Place) -> list[int]:
        """Ranks that have not finished writing into ``folder``.

        Raises:
            OSError: one has given up.
        """
        names = set(folder.list())
        if failed := sorted(name for name in names if name.endswith(FAILED)):
            raise OSError(f"{failed[0].removesuffix(FAILED)} could not write")
        return [rank for rank in range(self._world) if f"rank-{rank:05d}.json" not in names]

    def commit(self, folder: Place, manifest: dict[str, Any], copies: Mapping[str, Path]) -> None:
        """Rank 0: make the folder a checkpoint, unless a newer attempt has begun.

        Args:
            folder: where every rank has written.
            manifest: all that it says but the files.
            copies: local files that belong to it, by their name in the checkpoint.

        Raises:
            SupersededError: it has.
            FileExistsError: the folder is committed already.
        """
        files: list[dict[str, Any]] = []
        digests: list[dict[str, int]] = []
        for rank in range(self._world):
            content = folder.read(f"rank-{rank:05d}.json")
            record = json.loads(content)
            digests.append(record["state_digests"])
            files.append({name: record[name] for name in ("file", "bytes", "sha256")})
            sha256 = hashlib.sha256(content).hexdigest()
            files.append({"file": f"rank-{rank:05d}.json", "bytes": len(content), "sha256": sha256})
        files += [_copied(folder, name, path) for name, path in copies.items()]
        self.refuse_if_superseded()
        manifest = {**manifest, "saved_at": time.time(), "state_digests": summed(digests), "files": files}
        if not folder.create(MANIFEST, sealed(manifest)):
            self.refuse_if_superseded()
            raise FileExistsError(f"{folder} is committed already")
        if self.folder.is_local:
            sync_folder(self.folder.path)
        self.refuse_if_superseded()  # the newer attempt's folders are not this one's to tidy
        try:
            self.folder.write("latest", f"{folder.name}\n".encode())
            for name, path in copies.items():  # for people; a resume takes them from the checkpoint
                _copied(self.folder.parent, name, path)
            self._clean_up()
        except OSError as error:  # the checkpoint is whole: what is left to do here must not lose it
            _log.warning("checkpoint %s is whole, but older ones could not be tidied up: %s", folder.name, error)

    @contextlib.contextmanager
    def unless_superseded(self) -> Iterator[None]:
        """What fails inside while a newer attempt runs fails because of that: it is no failure of the run.

        The others of this attempt may be gone, or a checkpoint that is being read.

        Raises:
            SupersededError: in place of any other.
        """
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):
                self.refuse_if_superseded()
            raise

    def refuse_if_superseded(self) -> None:
        """Raise SupersededError when a newer attempt has begun."""
        self._attempts.refuse_if_superseded()

    def _clean_up(self) -> None:
        """Remove what need not be kept, and what older attempts left unfinished."""
        while self._stale:
            self._stale.pop().unlink(missing_ok=True)
        remove_old(self.folder, self._settings, self.attempt)


def _copied(folder: Place, name: str, path: Path) -> dict[str, Any]:
    with path.open("rb") as source:
        return write_copy(folder, name, source)
