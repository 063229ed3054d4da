"""The loop: next batch, forward, backward, step, record, maybe save; and stopping together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from beit_dist.config import TrainConfig
from beit_dist.data.plan import Plan
from beit_dist.data.stream import RankBatch, RankBatches
from beit_dist.engine.average import WeightAverage
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.compiled import CompiledBlocks
from beit_dist.engine.distributed import Agreement
from beit_dist.engine.guard import Guard
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.profiling import Profiler
from beit_dist.engine.record import Recorder, StepFacts
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.run_folder import DONE, PREEMPTED, RunFolder
from beit_dist.engine.saving import Saving
from beit_dist.engine.schedule import Schedule
from beit_dist.engine.stragglers import Stragglers
from beit_dist.engine.timeouts import Timeouts
from beit_dist.engine.validation import Validation
from beit_dist.engine.watchdog import Watchdog
from beit_dist.errors import SampleError, TrainingError


@dataclass
class Progress:
    """Where a run is. Everything else follows from it, the recipe and the plan."""

    step: int = 0
    """Optimizer steps attempted."""
    consumed: int = 0
    """Samples consumed per lane: the position in the plan."""
    first_batch: int = 0
    """Global batch of the run's first start, the unit of the schedule's time."""
    samples: int = 0
    """Samples trained on, over all lanes: consumed · lanes."""
    counters: dict[str, int] = field(default_factory=lambda: {"skipped": 0, "bad": 0, "masked": 0})


@dataclass
class Parts:
    """What a trainer works with; built by ``beit_dist/engine/build.py``."""

    config: TrainConfig
    resolved: Resolved
    engine: Any
    device: torch.device
    plan: Plan
    schedule: Schedule
    total_steps: int
    batches: RankBatches
    agreement: Agreement
    store: CheckpointStore
    saving: Saving
    average: WeightAverage | None
    validation: Validation | None
    recorder: Recorder
    guard: Guard
    stragglers: Stragglers
    compiled: CompiledBlocks
    profiler: Profiler
    watchdog: Watchdog
    timeouts: Timeouts
    metrics: Metrics | None
    run: RunFolder
    stop: StopRequest
    progress: Progress
    facts: dict[str, Any]
    """What every manifest says besides the position: recipe, plan, versions."""

    def close(self) -> None:
        """Release what the run holds, each part before those it depends on, but not the process's own."""
        self.batches.close()
        if self.validation is not None:
            self.validation.close()
        self.compiled.close()
        self.profiler.close()
        self.recorder.close()
        self.guard.close()
        self.stragglers.close()
        if self.metrics is not None:
            self.metrics.close()


class Trainer:
    """Trains from ``progress`` to the last step, a stop request, or a failure. All ranks run the same loop."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.progress = parts.progress
        self._skipped_in_a_row = 0
        self.reason: str | None = None  # why the run was stopped before its last step

    def run(self) -> str:
        """Train; the marker that says how it ended (``DONE`` or ``PREEMPTED``).

        Raises:
            TrainingError: too many steps without an update, or the last checkpoint could not be saved.
        """
        parts, progress = self.parts, self.progress
        if not self._validate_if_due(again=True):  # a stop may have cut this step's measurement short
            return self._stop()
        left = progress.step < parts.total_steps
        batch = self._fetch() if left else None
        while left:
            masked, bad, stop, save, written, alarm, *halves = parts.agreement.result()
            if alarm:
                parts.guard.stop_for_spike()
            if stop:
                return self._stop()
            if written == parts.resolved.ranks:
                parts.saving.finish()
            self._count_bad(bad)
            assert batch is not None  # a rank without one has posted a stop; for the type checker
            digest = (halves[0] + (halves[1] << 32)) % 2**64
            batch = self._train_step(batch, masked, bad, digest)
            left = progress.step < parts.total_steps
            if not self._validate_if_due():
                if left:
                    parts.agreement.result()  # of a batch that is not trained on any more
                return self._stop()
            if left and (save or parts.saving.is_due_by_step(progress.step)):
                self._save()
        self._save_and_wait()
        return DONE

    def _stop(self) -> str:
        """Save, as asked to. Collective."""
        asked = [name for name in self.parts.agreement.gather(self.parts.stop.name) if name]
        self.reason = asked[0] if asked else None
        self._save_and_wait()
        return PREEMPTED

    def _train_step(self, batch: RankBatch, masked: int, bad: int, digest: int) -> RankBatch | None:
        """One optimizer step on this rank's rows of the global batch; the next batch, if there is a next step.

        The loss is the sum over the masked patches divided by their number in the *global* batch. DeepSpeed
        averages gradients over the ranks, hence the factor of their number.
        """
        parts, progress = self.parts, self.progress
        parts.profiler.step_begins(progress.step + 1)
        lr = parts.schedule.lr(progress.samples / progress.first_batch)
        for group in parts.engine.optimizer.param_groups:
            group["lr"] = lr
        scale = parts.resolved.ranks / masked if masked else 0.0

        loss_sum, correct = torch.zeros((2,), device=parts.device)
        losses = []
        following: RankBatch | None = None
        for number, micro_batch in enumerate(self._micro_batches(batch), start=1):
            with parts.stragglers.own_time():
                output = parts.engine(*micro_batch)
            parts.engine.backward(output.loss_sum * scale, scale_wrt_gas=False)
            parts.compiled.micro_batch_ended()
            losses.append(output.loss_sum.detach())
            loss_sum = loss_sum + losses[-1]
            correct = correct + output.correct
            if number == parts.resolved.accumulation and progress.step + 1 < parts.total_steps:
                following = self._fetch(after=batch)  # while the device still works on what it was given
            parts.engine.step()

        applied = bool(parts.engine.was_step_applied())
        if applied and parts.average is not None:
            parts.average.update()
        progress.step += 1
        parts.profiler.step_ended(progress.step)
        progress.consumed += self._per_lane()
        progress.samples += parts.config.global_batch
        progress.counters["masked"] += masked
        facts = StepFacts(
            step=progress.step,
            samples=progress.samples,
            epoch=progress.samples / parts.plan.samples,
            lr=lr,
            masked=masked,
            bad=bad,
            applied=applied,
            wait_seconds=batch.wait_seconds,
            batch=f"{digest:016x}",
        )
        parts.guard.note(progress.step, losses, batch.sample_ids)
        parts.stragglers.step_ended(batch.wait_seconds)
        if parts.recorder.add(facts, loss_sum, correct, parts.engine.get_global_grad_norm()):
            parts.stragglers.compare()
        self._count_skipped(applied)
        parts.guard.check_parameters(progress.step)
        parts.watchdog.beat()
        parts.timeouts.step_ended()
        return following

    def _micro_batches(self, batch: RankBatch) -> Iterator[tuple[Tensor | None, ...]]:
        """The rank's rows as (patches, tokens, positions, keeps) on the device, one micro-batch at a time."""
        size, device = self.parts.resolved.micro_batch, self.parts.device
        tensors = (batch.patches, batch.tokens, batch.positions, batch.keeps)
        for low in range(0, self.parts.resolved.rank_batch, size):
            yield tuple(
                None if tensor is None else tensor[low : low + size].to(device, non_blocking=True)
                for tensor in tensors
            )

    def _fetch(self, after: RankBatch | None = None) -> RankBatch | None:
        """The next batch; starts the ranks' agreement on it, whose result is read at the next step's start.

        None: a stop request came while there was no batch. Waiting for data can take minutes, so a rank that
        waits looks for requests, its own and (in the store) those of others, and posts a stop without a batch.
        That is safe, because the decision is still taken once, by the sum: each rank posts exactly once for
        each step, all read the same sum before the step, and it cannot be without a stop when a rank has posted
        one. A rank that did not see the request, or has posted "go on" before it, stops by the same sum. A
        request that comes after this rank's post waits for the next boundary. The batches that others have
        fetched were not trained on; the position only moves with a step, so they are read again.
        """
        parts = self.parts
        batch = parts.batches.next_unless(lambda: parts.stop.known)
        expected = self.progress.consumed + (self._per_lane() if after is not None else 0)
        if batch is not None and batch.consumed != expected:
            raise RuntimeError(f"the stream is at {batch.consumed}, the trainer at {expected}")
        save, written = parts.saving.is_due_by_clock, parts.saving.has_written
        masked, bad, stop = (batch.masked, batch.bad, parts.stop.requested) if batch else (0, 0, True)
        # 64 bits in halves, so that sums over any number of ranks stay below 2⁶³.
        halves = (batch.digest % 2**32, batch.digest >> 32) if batch else (0, 0)
        parts.agreement.post([masked, bad, stop, save, written, parts.guard.alarm, *halves])
        return batch

    def _validate_if_due(self, again: bool = False) -> bool:
        """Measure the held-out loss; before a save of the same step, so that no result is missing behind it.

        Args:
            again: the run goes on behind this step: only if its result is missing.

        Returns:
            False: it is due, but a rank was asked to stop meanwhile, which all ranks know.
        """
        parts, progress = self.parts, self.progress
        validation = parts.validation
        if validation is None or not progress.step or not validation.is_due(progress.step, parts.total_steps):
            return True
        if again and parts.agreement.from_rank_0(parts.recorder.has_validation(progress.step)):
            return True
        parts.recorder.flush()
        result = validation.measure(parts.engine.module, parts.stop, parts.watchdog.beat)
        if result is not None:
            parts.recorder.add_validation(progress.step, progress.samples, result)
        parts.recorder.pause()
        parts.watchdog.beat()
        return result is not None

    def _save(self, urgent: bool = False) -> None:
        """Begin a checkpoint, with the numbers of all steps before it on the disk.

        ``urgent``: there are no next steps.
        """
        parts, progress = self.parts, self.progress
        parts.recorder.flush(durable=True)
        facts = {
            **parts.facts,
            "position": {
                "consumed": progress.consumed,
                "samples": progress.samples,
                "first_batch": progress.first_batch,
            },
            "counters": dict(progress.counters),
            "guard": parts.guard.state,
        }
        parts.saving.begin(progress.step, facts, parts.run.copies, parts.recorder.fault, urgent=urgent)
        parts.recorder.pause()

    def _save_and_wait(self) -> None:
        """The last checkpoint of this start."""
        self._save(urgent=True)
        self.parts.saving.finish_last(self.progress.step)

    def _count_bad(self, bad: int) -> None:
        counters, allowed = self.progress.counters, self.parts.config.loader.bad_samples
        counters["bad"] += bad
        if counters["bad"] > allowed:
            raise SampleError(
                f"{counters['bad']} damaged samples, loader.bad_samples allows {allowed}. Find them with "
                f"tools/check_shards.py {self.parts.config.data}"
            )

    def _count_skipped(self, applied: bool) -> None:
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self.progress.counters["skipped"] += not applied
        limit = self.parts.config.max_skipped_in_a_row
        if self._skipped_in_a_row >= limit:
            self.parts.recorder.flush()
            blamed, details = self.parts.guard.blame()
            raise TrainingError(
                f"{limit} steps in a row up to step {self.progress.step} had gradients that were not finite; "
                f"nothing was updated in them. {blamed} Lower optimizer.lr, or raise max_skipped_in_a_row.",
                details,
            )

    def _per_lane(self) -> int:
        return self.parts.config.global_batch // self.parts.plan.lanes
