"""The loop of every kind of training: next batch, forward, backward, step, record, maybe measure, maybe save."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beit_dist.engine.average import WeightAverage
from beit_dist.engine.compiled import CompiledBlocks
from beit_dist.engine.guard import Guard
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.process import Process
from beit_dist.engine.profiling import Profiler
from beit_dist.engine.ranks.stragglers import Stragglers
from beit_dist.engine.record import Recorder, Taken
from beit_dist.engine.run_folder import DONE, PREEMPTED
from beit_dist.engine.saving import Saving
from beit_dist.engine.schedule import Schedule
from beit_dist.engine.task import Fetched, Progress, Task
from beit_dist.errors import TrainingError


@dataclass
class Watchers:
    """Who looks on: numbers are recorded, and what is wrong is found, but nothing is changed."""

    recorder: Recorder
    guard: Guard
    stragglers: Stragglers
    compiled: CompiledBlocks
    profiler: Profiler
    metrics: Metrics | None
    """Rank 0's."""

    def close(self) -> None:
        """Release what they hold."""
        self.compiled.close()
        self.profiler.close()
        self.recorder.close()
        self.guard.close()
        self.stragglers.close()
        if self.metrics is not None:
            self.metrics.close()


class Trainer:
    """Trains from ``progress`` to the last step, a stop request, or a failure. All ranks run the same loop.

    Args:
        task: what is trained.
        engine: DeepSpeed's, around the task's model.
        process: this rank, and the ranks' agreement.
        schedule: of the learning rate.
        total_steps: where the run ends.
        progress: where it is.
        saving: of checkpoints.
        average: of the weights, if there is one.
        watchers: who look on.

    Attributes:
        reason: why the run was stopped before its last step.
    """

    def __init__(
        self,
        task: Task[Any, Any, Any],
        engine: Any,
        process: Process,
        schedule: Schedule,
        total_steps: int,
        progress: Progress,
        saving: Saving,
        average: WeightAverage | None,
        watchers: Watchers,
    ) -> None:
        self.task, self.engine, self.process = task, engine, process
        self.schedule, self.total_steps, self.progress = schedule, total_steps, progress
        self.saving, self.average, self.watchers = saving, average, watchers
        self.reason: str | None = None
        self._skipped_in_a_row = 0
        self._measuring = False

    def run(self) -> str:
        """Train; the marker that says how it ended (``DONE`` or ``PREEMPTED``).

        Raises:
            TrainingError: the guard or the task stopped the run, too many steps had no update, or the last
                checkpoint could not be saved.
        """
        agreement, progress = self.process.agreement, self.progress
        if not self._measure_if_due(again=True):  # a stop may have cut this step's measurement short
            return self._stop()
        left = progress.step < self.total_steps
        fetched = self._fetch(following=False) if left else None
        self.process.stop.then = self._at_a_stop
        while left:
            stop, save, written, alarm, *summed = agreement.result()
            if alarm:
                self._stop_for(self.watchers.guard.alarm or self.task.alarm)
            if stop:
                return self._stop()
            if written == agreement.ranks.world:
                self.saving.finish()
            assert fetched is not None  # for the type checker: there is one where steps are left
            fetched = self._train_step(fetched, summed)
            self.saving.find_memory()
            left = progress.step < self.total_steps
            if not left:
                self.watchers.recorder.flush()
                self._stop_for(self.task.alarm)  # not for a spike: nothing follows that it could spoil
            if not self._measure_if_due():
                if left:
                    agreement.result()  # of a batch that is not trained on any more
                return self._stop()
            if left and (save or self.saving.is_due_by_step(progress.step)):
                self._save()
        self._save_and_wait()
        return DONE

    def steps(self) -> Iterator[float]:
        """Steps as :meth:`run` takes them, one each time it is asked for, without saves and held-out measurements.

        Of each, the seconds that this rank waited for its data.

        There is no last one: data and schedules go past the end of the run. Collective.
        """
        self.total_steps = sys.maxsize
        fetched: Fetched | None = self._fetch(following=False)
        while fetched is not None:
            _, _, _, _, *summed = self.process.agreement.result()
            waited = fetched.wait_seconds
            fetched = self._train_step(fetched, summed)
            yield waited

    def _at_a_stop(self) -> str:
        """What a stop request leads to that comes now. Whether the ranks know of it at the end of the step under
        way, or at the next, is up to when it comes."""
        step, total = self.progress.step, self.total_steps
        if step >= total:
            return f"all {total} steps are taken; the last checkpoint is being saved"
        if self._measuring:
            return f"stopping after step {step}, without what is being measured, and saving a checkpoint"
        steps = f"{step + 1} or {step + 2}" if step + 2 <= total else f"{step + 1}"
        return f"stopping after step {steps} of {total} and saving a checkpoint"

    def _stop(self) -> str:
        """Save, as asked to. Collective."""
        asked = [name for name in self.process.agreement.gather(self.process.stop.name) if name]
        self.reason = asked[0] if asked else None
        self._save_and_wait()
        return PREEMPTED

    def _stop_for(self, alarm: str | None) -> None:
        """Fail on all ranks if rank 0 has an alarm. Collective."""
        if said := self.process.agreement.from_rank_0(alarm):
            raise TrainingError(said)

    def _train_step(self, fetched: Fetched, summed: list[int]) -> Fetched | None:
        """One optimizer step on this rank's rows of the global batch; what comes next, if there is a next step.

        The loss is the sum over the rows divided by the step's weight, counted over the *global* batch. DeepSpeed
        averages gradients over the ranks, hence the factor of their number.
        """
        task, engine, progress, watchers = self.task, self.engine, self.progress, self.watchers
        watchers.profiler.step_begins(progress.step + 1)
        step = task.begin(fetched.batch, summed)
        lr = self.schedule.lr(progress.time)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_share", 1.0)
        scale = self.process.ranks.world / step.weight if step.weight else 0.0

        sums = torch.zeros(len(task.numbers), device=self.process.device)
        tally: Tensor | None = None
        losses: list[Tensor] = []
        following: Fetched | None = None
        micro_batches = task.rows(fetched.batch)
        accumulation = engine.gradient_accumulation_steps()
        for number in range(1, accumulation + 1):
            with watchers.stragglers.own_time():
                made = task.forward(next(micro_batches), step)
            engine.backward(made.loss * scale, scale_wrt_gas=False)
            watchers.compiled.micro_batch_ended()
            losses.append(made.loss.detach())
            sums = sums + torch.stack([each.detach().float() for each in made.numbers])
            if made.tally is not None:
                tally = made.tally if tally is None else tally + made.tally
            if number == accumulation and progress.step + 1 < self.total_steps:
                following = self._fetch(following=True)  # while the device still works on what it was given
            engine.step()

        applied = bool(engine.was_step_applied())
        progress.step += 1
        if applied and self.average is not None:
            self.average.update(most=task.average_limit(progress.step))
        watchers.profiler.step_ended(progress.step)
        progress.samples += task.config.global_batch
        progress.count(task.known, step.known)
        task.finish()
        taken = Taken(
            number=progress.step,
            step=step,
            samples=progress.samples,
            epoch=progress.samples / task.epoch_samples,
            lr=lr,
            applied=applied,
            wait_seconds=fetched.wait_seconds,
        )
        if fetched.samples is not None:
            watchers.guard.note(progress.step, losses, fetched.samples)
        watchers.stragglers.step_ended(fetched.wait_seconds)
        if watchers.recorder.add(taken, sums, tally, engine.get_global_grad_norm()):
            watchers.stragglers.compare()
        self._count_skipped(applied)
        watchers.guard.check_parameters(progress.step)
        self.process.watchdog.beat()
        self.process.timeouts.step_ended()
        return following

    def _fetch(self, following: bool) -> Fetched:
        """The next batch; starts the ranks' agreement on it, whose result is read at the next step's start.

        Without a batch, a stop request came while there was none. Waiting for data can take minutes, so a rank
        that waits looks for requests, its own and (in the store) those of others, and posts a stop without a
        batch. That is safe, because the decision is still taken once, by the sum: each rank posts exactly once
        for each step, all read the same sum before the step, and it cannot be without a stop when a rank has
        posted one. A rank that did not see the request, or posted before it came, stops by the same sum. A
        request that comes after this rank's post waits for the next boundary. The batches that others have
        fetched were not trained on; the position only moves with a step, so they are read again.
        """
        saving, alarm = self.saving, bool(self.watchers.guard.alarm or self.task.alarm)
        fetched = self.task.fetch(following)
        stop = self.process.stop.requested if fetched.batch is not None else True
        self.process.agreement.post([stop, saving.asks_by_clock(), saving.has_written, alarm, *fetched.integers])
        return fetched

    def _measure_if_due(self, again: bool = False) -> bool:
        """Measure on held-out data; before a save of the same step, so that no result is missing behind it.

        Args:
            again: the run continues behind this step: only if its result is missing.

        Returns:
            False: it is due, but a rank was asked to stop meanwhile, which all ranks know.
        """
        task, progress, recorder = self.task, self.progress, self.watchers.recorder
        if not task.evaluates or not progress.step or not task.is_due(progress.step, self.total_steps):
            return True
        if again and self.process.agreement.from_rank_0(recorder.has_result(progress.step)):
            return True
        recorder.flush()
        began = time.monotonic()
        self._measuring = True
        values = task.evaluate(progress.step)
        self._measuring = False
        if values is not None:
            recorder.add_result(progress.step, progress.samples, values, time.monotonic() - began)
        recorder.pause()
        self.process.watchdog.beat()
        return values is not None

    def _save(self, urgent: bool = False) -> None:
        """Begin a checkpoint, with the numbers of all steps before it on the disk.

        ``urgent``: there are no next steps.
        """
        progress, recorder = self.progress, self.watchers.recorder
        recorder.flush(durable=True)
        facts = {
            "position": {
                **self.task.position(),
                "samples": progress.samples,
                "first_batch": progress.first_batch,
            },
            "counters": dict(progress.counters),
            "guard": self.watchers.guard.state,
        }
        self.saving.begin(progress.step, facts, recorder.fault, urgent=urgent)
        recorder.pause()

    def _save_and_wait(self) -> None:
        """The last checkpoint of this start."""
        self._save(urgent=True)
        self.saving.finish_last(self.progress.step)

    def _count_skipped(self, applied: bool) -> None:
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self.progress.counters["skipped"] += not applied
        limit = self.task.config.max_skipped_in_a_row
        if self._skipped_in_a_row >= limit:
            self.watchers.recorder.flush()
            blamed, details = self.watchers.guard.blame()
            raise TrainingError(
                f"{limit} steps in a row up to step {self.progress.step} had gradients that were not finite and "
                f"updated nothing. {blamed} {self.task.blame}",
                details,
            )
