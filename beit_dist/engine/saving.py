"""Checkpoints of a loop: when one is due, beside which steps it is written, and what a failed one means."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from beit_dist.config.run import CheckpointConfig
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.store import CheckpointStore, SaveResult
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.process import Process
from beit_dist.engine.run_folder import RunFolder
from beit_dist.errors import TrainingError

_log = logging.getLogger(__name__)


class Saving:
    """The saves of one start of a run; every method but the properties is called by all ranks together.

    Args:
        store: the run's checkpoints.
        state: what is saved.
        settings: when to save, and how many failures in a row to bear.
        process: this rank.
        run: whose files of numbers go with a checkpoint.
        facts: what every manifest says.
        metrics: rank 0's metrics; None on the other ranks.
    """

    def __init__(
        self,
        store: CheckpointStore,
        state: EngineState,
        settings: CheckpointConfig,
        process: Process,
        run: RunFolder,
        facts: Mapping[str, Any],
        metrics: Metrics | None,
    ) -> None:
        self._store, self._state, self._settings = store, state, settings
        self._process, self._run, self._facts, self._metrics = process, run, facts, metrics
        self._failed = 0
        self._fault = ""
        self._last = time.monotonic()

    def asks_by_clock(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed, which starts them anew. Rank 0's clock alone decides.

        The ranks begin to save a step later, and this was asked once more by then: it must not save twice.
        """
        minutes, now = self._settings.every_minutes, time.monotonic()
        if self._store.rank != 0 or minutes is None or now - self._last <= 60 * minutes:
            return False
        self._last = now
        return True

    def is_due_by_step(self, step: int) -> bool:
        """Whether ``checkpoint.every_steps`` asks for one after this step."""
        every = self._settings.every_steps
        return every is not None and step % every == 0

    @property
    def has_written(self) -> bool:
        """Whether this rank's part of the save in flight is over."""
        return self._store.has_written

    def begin(self, step: int, facts: Mapping[str, Any], fault: str, *, urgent: bool = False) -> None:
        """Start to save beside the next steps; they wait for the copy to host memory, and for a save before.

        Args:
            step: steps attempted so far.
            facts: what the manifest says of this step.
            fault: rank 0: why the numbers of the steps so far, which a checkpoint vouches for, are not on the
                disk; empty when they are.
            urgent: there are no next steps.
        """
        self.finish()
        began = time.monotonic()
        if fault := self._process.agreement.from_rank_0(fault):
            if self._store.rank == 0:
                _log.error("checkpoint of step %d was not saved: %s", step, fault)
            self._last = began
            self._count(SaveResult(step, fault, 0.0))
            return
        self._store.begin_save(step, self._state, {**self._facts, **facts}, self._run.copies, urgent=urgent)
        self._last = time.monotonic()
        if self._metrics is not None:
            self._metrics.observe("beit_checkpoint_stall_seconds", self._last - began)

    def find_memory(self) -> None:
        """Make the first save as fast as later ones. To be called after the first step."""
        self._store.find_memory()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and count how it ended.

        Raises:
            TrainingError: ``checkpoint.max_failed_saves`` in a row failed.
        """
        if not self._store.is_saving:
            return
        with self._process.timeouts.saving():
            result = self._store.finish_save()
        self._process.watchdog.beat()
        if result is not None:
            self._count(result)

    def finish_last(self, step: int) -> None:
        """Wait for the save that ends this start of the run; without it the run has not ended well.

        Raises:
            TrainingError: it failed.
        """
        self.finish()
        if self._failed:
            raise TrainingError(
                f"the checkpoint of step {step}, the last one, could not be saved: {self._fault}. Make room, or "
                "check the disk, and start again: the run continues from the checkpoint before it."
            )

    def _count(self, result: SaveResult) -> None:
        limit = self._settings.max_failed_saves
        self._failed = 0 if result.ok else self._failed + 1
        self._fault = result.fault
        if self._metrics is not None:
            self._metrics.add("beit_checkpoint_saves", result="ok" if result.ok else "failed")
            self._metrics.observe("beit_checkpoint_duration_seconds", result.seconds)
            if result.ok:
                self._metrics.set({"beit_checkpoint_last_success_timestamp_seconds": time.time()})
        if self._failed >= limit:
            raise TrainingError(
                f"{limit} checkpoints in a row could not be saved, the last at step {result.step}: "
                f"{result.fault.rstrip('.')}. Check the disk, or raise checkpoint.max_failed_saves."
            )
