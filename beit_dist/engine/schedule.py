"""Learning rate and length of a run as pure functions of the position: nothing to save, nothing to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.config.reading import exact
from beit_dist.config.run import RunConfig
from beit_dist.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then a cosine or a line to ``min_lr``, per step (unilm ``utils.cosine_scheduler``).

    Time is counted in first batches: ``t = total samples / first global batch``, so that a run continued with
    another global batch keeps its place. As in the original the warm-up is an inclusive ``linspace``: the first
    update has learning rate 0, and the peak is reached twice, at the end of the warm-up and where the
    fall starts.

    Args:
        optimizer: peak and final learning rate.
        warmup: length of the warm-up in first batches.
        total: length of the run in first batches.
    """

    optimizer: OptimizerConfig
    warmup: float
    total: float

    def lr(self, t: float) -> float:
        """Learning rate of the step that starts at time ``t``."""
        peak, low = self.optimizer.lr, self.optimizer.min_lr
        if t < self.warmup:
            # At most the peak: where the warm-up is no whole number of steps, its last one lies behind its end.
            return peak * min(1.0, t / max(1.0, self.warmup - 1))
        progress = min(1.0, (t - self.warmup) / max(1.0, self.total - self.warmup))
        left = 1 - progress if self.optimizer.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return low + (peak - low) * left


def steps_of(config: RunConfig, samples: int, step: int = 0, trained: int = 0) -> int:
    """Optimizer steps of a run on ``samples`` samples: ``steps``, or up to the first that completes ``epochs``.

    Args:
        config: the recipe.
        samples: of an epoch.
        step: where the run is; the steps before may have had another global batch.
        trained: samples of those steps.
    """
    if config.steps is not None:
        return config.steps
    left = _epochs(config) * samples - trained
    return step + max(0, math.ceil(left / config.global_batch))


def schedule_of(config: RunConfig, samples: int, first_batch: int, step: int = 0, trained: int = 0) -> Schedule:
    """The schedule of a run on ``samples`` samples an epoch that was first started with ``first_batch``.

    ``step`` and ``trained`` are those of :func:`steps_of`.

    Raises:
        ConfigError: the warm-up is not shorter than the run.
    """
    settings = config.optimizer
    if settings.lr_steps is not None:
        end, total = "optimizer.lr_steps", float(settings.lr_steps)
    elif config.steps is not None:
        end, total = "steps", (trained + max(0, config.steps - step) * config.global_batch) / first_batch
    else:
        end, total = "epochs", float(math.ceil(_epochs(config) * samples / first_batch))
    if settings.warmup_epochs is not None:
        field, warmup = "optimizer.warmup_epochs", float(exact(settings.warmup_epochs) * samples / first_batch)
    elif settings.warmup_steps is not None:
        field, warmup = "optimizer.warmup_steps", float(settings.warmup_steps)
    elif settings.warmup_share is not None:
        field, warmup = "optimizer.warmup_share", settings.warmup_share * total
    else:
        field, warmup = "optimizer.warmup_steps", float(config.default_warmup)
    if warmup > 0 and warmup >= total:
        raise ConfigError(
            field,
            getattr(settings, field.rpartition(".")[2]),
            f"a warm-up shorter than the {total:g} steps that {end} gives (this one takes {warmup:g})",
            f"Lower {field}, or raise {end}.",
        )
    return Schedule(settings, warmup, total)


def _epochs(config: RunConfig) -> Fraction:
    if config.epochs is None:
        raise ConfigError("epochs", None, "a number, as steps is null")
    return exact(config.epochs)
