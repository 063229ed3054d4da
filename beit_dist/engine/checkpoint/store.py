"""The folder of checkpoints: attempts, saving beside the training, finding the newest whole one, what is kept.

A checkpoint is a folder ``step-SSSSSSSS.aAAAA`` written by one attempt (one start of the run). Its
``manifest.json`` is written last and is the commit: a folder without it does not exist. The manifest names
every file with size and sha256, so a damaged checkpoint is noticed and the one before is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beit_dist.config import CheckpointConfig
from beit_dist.durable import leftovers, sync_folder
from beit_dist.engine.checkpoint.attempts import Attempts, SupersededError
from beit_dist.engine.checkpoint.files import file_fault, write_copy, write_fragments
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.image import FileImage
from beit_dist.engine.checkpoint.layout import (
    AVERAGE,
    BAD,
    FORMAT_VERSION,
    GIVEN_UP,
    MANIFEST,
    Saved,
    committed,
    folder_name,
    parse_folder_name,
    rank_records,
    read_manifest,
    role_digests,
    sealed,
    summed,
)
from beit_dist.engine.checkpoint.ranges import FragmentReader
from beit_dist.engine.distributed import Agreement
from beit_dist.errors import CheckpointError
from beit_dist.storage.place import Place

_log = logging.getLogger(__name__)
FAILED = ".failed"
_NICE = 10  # a tenth of the training's share of a core that both want: a save gets on, and is hardly felt
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
        self._writing: _Writing | None = None
        self._whole_step: int | None = None  # the last step of this run that is known to be whole
        self._resumed_from: str | None = None

    @property
    def rank(self) -> int:
        """This rank; rank 0 commits."""
        return self._rank

    @property
    def timeout_seconds(self) -> float:
        """How long rank 0 waits for the others' files."""
        return self._settings.timeout_seconds

    @property
    def attempt(self) -> int:
        """The number of this start of the run; 0 before ``begin_attempt``."""
        return self._attempts.number

    def begin_attempt(self) -> int:
        """Take the next attempt number by exclusive creation; the same number on every rank."""
        if self._rank == 0:
            self._attempts.begin()
            if self.folder.is_local:
                folder = self.folder.path
                places = (folder, self._attempts.place.path, folder.parent)
                self._stale = [file for place in places for file in leftovers(place)]
        self._attempts.number = self._agreement.from_rank_0(self.attempt)
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
            faults = [] if files else ["its manifest is damaged, or was not written to its end"]
            for record in files[self._rank :: self._world]:
                fault = file_fault(saved.folder, record["file"], record["bytes"], record["sha256"])
                faults += [fault] if fault else []
            faults = [fault for found in self._agreement.gather(faults) for fault in found]
            if not faults:
                return saved
            self.passed_over += 1
            if self._rank == 0:
                instead = "using the one before" if len(candidates) > 1 else "none is left, the run begins anew"
                _log.warning("checkpoint %s is damaged (%s); %s", saved.folder.name, faults[0], instead)
                _set_aside(saved.folder)

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
        """Have the system find the memory for the copies, in a thread: the first save then need not wait for it.

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
        """Copy the state to host memory and write it in a thread; training goes on meanwhile.

        Args:
            step: optimizer steps attempted so far; a step that is already whole is not saved again.
            state: the engine's state.
            facts: what the manifest shall say besides: position, plan, configuration, versions.
            copies: local files that rank 0 saves with the state, by their name in the checkpoint.
            urgent: nothing goes on meanwhile, so the writing need not give way to anything.

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
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        fragments = state.saved_fragments()
        if self._image is None or not self._image.fits(fragments):
            self._image = FileImage(fragments)
        self._image.take(fragments)
        folder = self.folder / folder_name(step, self.attempt)
        self._writing = _Writing(self, folder, step, self._image, manifest, copies or {}, urgent)
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
                self._remove(writing.folder.name)  # the newer attempt may have tidied up already
            raise SupersededError(superseded)
        if faults and self._rank == 0:
            _log.error("checkpoint of step %d was not saved: %s", writing.step, faults[-1])
            self._remove(writing.folder.name)
        if not faults:
            self._whole_step = writing.step
        seconds = self._agreement.from_rank_0(writing.seconds)
        # Rank 0's own fault is mostly that it missed a rank's file: what that rank says is the cause.
        return SaveResult(writing.step, faults[-1] if faults else "", seconds)

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
            self._tidy()
        except OSError as error:  # the checkpoint is whole: what is left to do here must not lose it
            _log.warning("checkpoint %s is whole, but older ones could not be tidied up: %s", folder.name, error)

    def missing(self, folder: Place) -> list[int]:
        """Ranks that have not finished writing into ``folder``.

        Raises:
            OSError: one has given up.
        """
        names = set(folder.list())
        if failed := sorted(name for name in names if name.endswith(FAILED)):
            raise OSError(f"{failed[0].removesuffix(FAILED)} could not write")
        return [rank for rank in range(self._world) if f"rank-{rank:05d}.json" not in names]

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

    def _tidy(self) -> None:
        """Remove what need not be kept, and what older attempts left unfinished."""
        while self._stale:
            self._stale.pop().unlink(missing_ok=True)
        found = committed(self.folder)
        for_good = kept_for_good(found, self._settings)
        for saved in found[self._settings.keep :]:
            if saved not in for_good:
                # Without its manifest a checkpoint does not exist: a removal cut short leaves no half one.
                saved.folder.remove(MANIFEST)
                self._remove(saved.folder.name)
        whole = {saved.folder.name for saved in found}
        for entry in self.folder.list():
            name = parse_folder_name(entry)
            if name and name[1] < self.attempt and entry not in whole and not self._is_damaged(entry):
                self._remove(entry)

    def _is_damaged(self, entry: str) -> bool:
        """Whether a checkpoint was committed but cannot be used; it stays, for somebody to look at."""
        folder = self.folder / entry
        return folder.exists(MANIFEST) and GIVEN_UP not in read_manifest(folder)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self.folder.remove_folder(name)


def kept_for_good(found: Sequence[Saved], settings: CheckpointConfig) -> list[Saved]:
    """Checkpoints that stay however many newer ones there are: every n steps, and every n hours."""
    steps, hours = settings.keep_every_steps, settings.keep_every_hours
    kept = [saved for saved in found if steps and saved.step % steps == 0]
    since = None
    for saved in sorted(found, key=lambda saved: saved.step):
        at = saved.manifest.get("saved_at")
        # In either direction: after a clock that was years ahead for a while they must not be years apart.
        if hours and at is not None and (since is None or abs(at - since) >= 3600 * hours):
            kept.append(saved)
            since = at
    return kept


def _copied(folder: Place, name: str, path: Path) -> dict[str, Any]:
    with path.open("rb") as source:
        return write_copy(folder, name, source)


def _set_aside(folder: Place) -> None:
    """Keep a damaged checkpoint out of the way, for somebody to look at."""
    if folder.is_local:
        names = (f"{folder.name}.bad{number or ''}" for number in itertools.count())
        folder.path.rename(next(path for path in map(folder.path.with_name, names) if not path.exists()))
    else:
        folder.write(BAD, b"")


def _yield_to_others() -> None:
    """Let this thread, and those that it starts, run when the training does not want the core (Linux only)."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICE))


class _Writing(threading.Thread):
    """One rank's part of a save; on rank 0 also the wait for the others, and the commit.

    There is no collective in here: ranks see each other's files, so a thread never meets the training's
    collectives in another order than a peer's does.
    """

    def __init__(
        self,
        store: CheckpointStore,
        folder: Place,
        step: int,
        image: FileImage,
        manifest: dict[str, Any],
        copies: Mapping[str, Path],
        urgent: bool,
    ) -> None:
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self.folder, self.step = folder, step
        self.fault = ""
        self.superseded = ""
        self.seconds = 0.0
        self._store, self._image, self._manifest, self._copies = store, image, manifest, copies
        self._urgent = urgent
        self._began = time.monotonic()

    def run(self) -> None:
        """Write, then on rank 0 commit; whatever goes wrong is kept for ``finish_save``."""
        store = self._store
        try:
            if not self._urgent:
                _yield_to_others()
            self.folder.make()
            write_fragments(self.folder, store.rank, self._image)
            if store.rank == 0:
                self._wait_for_others()
                store.commit(self.folder, self._manifest, self._copies)
        except SupersededError as error:
            self.superseded = str(error)
        except Exception as error:
            self.fault = f"rank {store.rank}: {error}"
            with contextlib.suppress(OSError):  # so that rank 0 need not wait for its time limit
                self.folder.write(f"rank-{store.rank:05d}{FAILED}", b"")
        self.seconds = time.monotonic() - self._began

    def _wait_for_others(self) -> None:
        limit, pause = self._store.timeout_seconds, _POLL
        while missing := self._store.missing(self.folder):
            if time.monotonic() - self._began > limit:
                raise TimeoutError(
                    f"ranks {missing[:8]} wrote nothing within checkpoint.timeout_seconds={limit:g}"
                )
            if pause >= _LONGEST_POLL:  # a newer attempt may have removed what they wrote, while this host hung
                self._store.refuse_if_superseded()
            time.sleep(pause)
            pause = min(_LONGEST_POLL, pause * 1.5)
