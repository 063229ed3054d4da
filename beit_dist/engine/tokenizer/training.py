"""The loop that trains a tokenizer: next images, forward, backward, step, record, maybe measure, maybe save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from beit_dist.data.crops import CropBatches
from beit_dist.engine.average import WeightAverage, gathered
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.distributed import Agreement
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.precision import LOW
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.run_folder import DONE, PREEMPTED, RunFolder
from beit_dist.engine.saving import Saving
from beit_dist.engine.timeouts import Timeouts
from beit_dist.engine.tokenizer.codebook import Codebook
from beit_dist.engine.tokenizer.draws import noise_of_rows
from beit_dist.engine.tokenizer.quality import Quality, measure, picture
from beit_dist.engine.tokenizer.record import StepFacts, TokenizerRecorder
from beit_dist.engine.watchdog import Watchdog
from beit_dist.errors import TrainingError
from beit_dist.tokenizer_config import TokenizerRecipe
from beit_dist.visual_tokens.dvae import DVAE, STRIDE
from beit_dist.visual_tokens.objective import average_usage, cosine, elbo, mapped_pixels


@dataclass
class Progress:
    """Where a training is. Images, crops, noise and schedules follow from the step alone."""

    step: int = 0
    """Optimizer steps attempted."""
    skipped: int = 0
    """Those without an update, because the gradient was not finite."""


@dataclass
class Parts:
    """What the loop works with; built by ``beit_dist/engine/tokenizer/build.py``."""

    recipe: TokenizerRecipe
    resolved: Resolved
    arithmetic: str
    """Of the convolutions: ``fp32``, ``bf16`` or ``fp16``."""
    engine: Any
    device: torch.device
    batches: CropBatches
    images: int
    """Images that are trained on."""
    held_out: Tensor
    """uint8 ``(N, 3, view_size, view_size)`` on the CPU, the same on every rank."""
    agreement: Agreement
    store: CheckpointStore
    state: EngineState
    average: WeightAverage | None
    shapes: dict[str, list[int]]
    """Of all parameters, by name."""
    codebook: Codebook
    recorder: TokenizerRecorder
    saving: Saving
    watchdog: Watchdog
    timeouts: Timeouts
    metrics: Metrics | None
    run: RunFolder
    stop: StopRequest
    progress: Progress
    facts: dict[str, Any]
    """What every manifest says besides the position: recipe, versions."""

    @property
    def rows(self) -> range:
        """This rank's rows of the batch."""
        size, rank = self.resolved.rank_batch, self.agreement.ranks.rank
        return range(rank * size, (rank + 1) * size)

    def close(self) -> None:
        """Release what the run holds, but not the process's own."""
        self.batches.close()
        self.recorder.close()
        if self.metrics is not None:
            self.metrics.close()


class TokenizerTrainer:
    """Trains from ``progress`` to the last step, a stop request, or a failure. All ranks run the same loop."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.progress = parts.progress
        self.quality: Quality | None = None  # of what was measured last
        self.reason: str | None = None  # why the run was stopped before its last step
        self._skipped_in_a_row = 0
        self._low = LOW.get(parts.arithmetic)
        self._noise = torch.Generator(parts.device)
        self.measured = DVAE(parts.recipe.model).requires_grad_(False).eval().to(parts.device)

    def run(self) -> str:
        """Train; the marker that says how it ended (``DONE`` or ``PREEMPTED``).

        Raises:
            TrainingError: the codebook collapsed, too many steps had no update, or the last save failed.
        """
        parts, progress, recipe = self.parts, self.progress, self.parts.recipe
        left = progress.step < recipe.steps
        if left:
            self._post()
        while left:
            stop, save, written, alarm = parts.agreement.result()
            if alarm:
                parts.codebook.stop(parts.agreement)
            if stop:
                asked = [name for name in parts.agreement.gather(parts.stop.name) if name]
                self.reason = asked[0] if asked else None
                self._save_and_wait()
                return PREEMPTED
            if written == parts.resolved.ranks:
                parts.saving.finish()
            self._train_step()
            left = progress.step < recipe.steps
            if left and progress.step % recipe.measured_every == 0:
                self.measure()
            if left and (save or parts.saving.is_due_by_step(progress.step)):
                self._save()
        parts.recorder.flush()
        if any(parts.agreement.gather(parts.codebook.alarm)):
            parts.codebook.stop(parts.agreement)
        self.measure()
        self._save_and_wait()
        return DONE

    @property
    def temperature(self) -> float:
        """Of this step: the recipe's cosine."""
        recipe = self.parts.recipe
        return cosine(*recipe.temperature, self.progress.step, recipe.temperature_fall)

    @property
    def kl_weight(self) -> float:
        """Of this step: rises from 0 on a cosine."""
        recipe = self.parts.recipe
        return cosine(0, recipe.kl_weight, self.progress.step, recipe.kl_rise)

    @property
    def lr(self) -> float:
        """Of this step: a linear rise, and a cosine down to ``min_lr``."""
        recipe, step = self.parts.recipe, self.progress.step
        rise = min(1.0, (step + 1) / (recipe.warmup_steps + 1))
        return rise * cosine(recipe.lr, recipe.min_lr, step, recipe.lr_steps or recipe.steps)

    def _train_step(self) -> None:
        """One optimizer step on this rank's rows of the batch.

        Every term of the loss but one is a mean over the images, and the micro-batches of all ranks are of one
        size, so the mean of their gradients is that of the batch. The other, the usage term, is given the
        batch's average token distribution: see :func:`elbo`.
        """
        parts, progress, recipe = self.parts, self.progress, self.parts.recipe
        began = time.monotonic()
        images = torch.from_numpy(next(parts.batches))
        facts = StepFacts(
            step=progress.step + 1,
            samples=(progress.step + 1) * recipe.batch,
            epoch=(progress.step + 1) * recipe.batch / parts.images,
            lr=self.lr,
            temperature=self.temperature,
            kl_weight=self.kl_weight,
            applied=True,
            wait_seconds=time.monotonic() - began,
        )
        for group in parts.engine.optimizer.param_groups:
            group["lr"] = facts.lr
        micro_batches = list(self._micro_batches(images))
        whole_usage = self._whole_usage([some for some, _ in micro_batches])

        losses = torch.zeros(4, device=parts.device)
        counts = torch.zeros(recipe.model.vocabulary, dtype=torch.int64, device=parts.device)
        for number, (some, rows) in enumerate(micro_batches, start=1):
            terms = elbo(
                partial(parts.engine, low=self._low),
                some,
                self._noise_of(rows),
                facts.temperature,
                facts.kl_weight,
                recipe.usage_weight,
                whole_usage,
            )
            parts.engine.backward(terms.loss / len(micro_batches), scale_wrt_gas=False)
            own = torch.stack([terms.loss.detach(), terms.negative_log_likelihood, terms.kl, terms.usage_kl])
            losses += own.float() / len(micro_batches)
            counts += terms.token_counts
            if number == len(micro_batches) and progress.step + 1 < recipe.steps:
                self._post()  # while the device still works on what it was given
            parts.engine.step()

        facts.applied = bool(parts.engine.was_step_applied())
        if facts.applied and parts.average is not None:
            # A young average follows quickly, or it would still hold the random start when a short run ends.
            parts.average.update(most=(1 + progress.step) / (10 + progress.step))
        progress.step += 1
        parts.recorder.add(facts, losses, counts, parts.engine.get_global_grad_norm())
        self._count_skipped(facts.applied)
        parts.watchdog.beat()
        parts.timeouts.step_ended()

    def _micro_batches(self, images: Tensor) -> Iterator[tuple[Tensor, range]]:
        """This rank's images on the device, one micro-batch at a time, with their rows of the batch."""
        parts, size = self.parts, self.parts.resolved.micro_batch
        for low in range(0, len(images), size):
            yield images[low : low + size].to(parts.device, non_blocking=True), parts.rows[low : low + size]

    def _noise_of(self, rows: range) -> Tensor:
        recipe = self.parts.recipe
        side = recipe.image_size // STRIDE
        shape = (recipe.model.vocabulary, side, side)
        return noise_of_rows(recipe.seed, self.progress.step, rows, shape, self._noise)

    def _whole_usage(self, micro_batches: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """How the usage term gets the average token distribution of the whole batch.

        With one micro-batch a rank, by averaging over the ranks what the forward pass gives anyway. With more,
        the encoder runs once over all of them before: the term then depends on neither ranks nor accumulation.
        """
        if len(micro_batches) == 1 or not self.parts.recipe.usage_weight:
            return self._over_ranks
        usages = []
        with torch.no_grad():
            for some in micro_batches:
                logits, _ = self.parts.engine.module(mapped_pixels(some), low=self._low)
                usages.append(average_usage(torch.log_softmax(logits.float(), dim=1)))
        whole = self._over_ranks(torch.stack(usages).mean(0))
        return lambda _: whole

    def _over_ranks(self, usage: Tensor) -> Tensor:
        world = self.parts.resolved.ranks
        if world > 1:
            usage = usage.clone()
            dist.all_reduce(usage)
            usage /= world
        return usage

    def _post(self) -> None:
        """Start the ranks' agreement on whether to stop or save; its result is read before the next step."""
        parts = self.parts
        saving = parts.saving
        parts.agreement.post(
            [parts.stop.requested, saving.is_due_by_clock, saving.has_written, parts.codebook.alarm]
        )

    def measure(self) -> None:
        """Measure the averaged weights on held-out images, note it and draw a picture. Collective.

        ``measured`` then has these weights, whole on every rank, and ``quality`` says how good they are. Comes
        before a save of the same step, so that no result is missing behind it.
        """
        parts, step, model = self.parts, self.progress.step, self.measured
        began = time.monotonic()
        parts.recorder.flush()
        fragments = parts.average.fragments if parts.average is not None else parts.state.owned_weights()
        model.load_state_dict(gathered(fragments, parts.shapes, parts.device))
        self.quality = quality = measure(model, parts.held_out, parts.agreement, parts.watchdog.beat)
        if parts.agreement.ranks.rank == 0:
            (parts.run.place / "pictures").write(f"step-{step:08d}.png", picture(model, parts.held_out))
        parts.recorder.add_quality(step, quality, time.monotonic() - began)
        parts.recorder.pause()
        parts.watchdog.beat()

    def _save(self, urgent: bool = False) -> None:
        """Begin a checkpoint, with the numbers of all steps before it on the disk.

        ``urgent``: there are no next steps.
        """
        parts, progress = self.parts, self.progress
        parts.recorder.flush(durable=True)
        facts = {
            **parts.facts,
            "position": {"step": progress.step},
            "counters": {"skipped": progress.skipped},
            "codebook": parts.codebook.state,
        }
        parts.saving.begin(progress.step, facts, parts.run.copies, parts.recorder.fault, urgent=urgent)
        parts.recorder.pause()

    def _save_and_wait(self) -> None:
        """The last checkpoint of this start."""
        self._save(urgent=True)
        self.parts.saving.finish_last(self.progress.step)

    def _count_skipped(self, applied: bool) -> None:
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self.progress.skipped += not applied
        limit, recipe = self.parts.recipe.max_skipped_in_a_row, self.parts.recipe
        if self._skipped_in_a_row >= limit:
            self.parts.recorder.flush()
            raise TrainingError(
                f"{limit} steps in a row up to step {self.progress.step} had gradients that were not finite; "
                f"nothing was updated in them. Lower lr ({recipe.lr:g}), or compute in fp32 (precision, or bf16 "
                "and fp16 of --ds_config)."
            )


def views(pixels: list[np.ndarray]) -> Tensor:
    """uint8 images ``(side, side, 3)`` as one tensor ``(N, 3, side, side)``."""
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
