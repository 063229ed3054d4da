"""Whether the lengths of a run suit the size of its data: what is worth a word before it starts, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator

from beit_dist.config.run import RunConfig
from beit_dist.engine.durations import duration
from beit_dist.engine.schedule import Schedule

_STEPS_AN_EPOCH = 10
"""A large batch on little data means few updates for the same work: the demo comes as far in 4 epochs with a batch
of 16 as in 9 with one of 64."""
_WARMUP = 0.2
"""Share of a run above which a warm-up is most likely a mistake. The paper's is 10 of 800 epochs, and ours are at
most an eighth."""
_ONLY_CHECKPOINT = "the only checkpoint is the one at the end"


def remarks(
    config: RunConfig, *, samples: int, steps: int, schedule: Schedule, views: int, evaluates: bool
) -> Iterator[str]:
    """What is unlikely to be meant, each with what to change.

    Args:
        config: the recipe.
        samples: of an epoch.
        steps: of the run.
        schedule: of the run.
        views: of each sample, of which an epoch sees one.
        evaluates: whether there is held-out data.
    """
    batch = config.global_batch
    if batch * _STEPS_AN_EPOCH > samples:
        fitting = max(1, samples // _STEPS_AN_EPOCH)
        yield (
            f"a batch of {batch} is {_share(batch / samples)} of the {samples:,} images: the model is updated "
            f"only {samples / batch:.1f} times an epoch. Try global_batch={fitting} or less."
        )
    if schedule.warmup > _WARMUP * schedule.total:
        yield (
            f"the warm-up takes {_share(schedule.warmup / schedule.total)} of the run; a twentieth is usual. Try "
            "optimizer.warmup_share=0.05 in place of optimizer.warmup_epochs and optimizer.warmup_steps."
        )
    epochs = steps * batch / samples
    if views > epochs:
        seen = math.ceil(epochs)
        yield (
            f"{views - seen} of the {views} views are never trained on, as an epoch sees one of them. Train for "
            f"epochs={views} or more, or make shards with --views {seen}."
        )
    between = config.checkpoint.every_steps
    if config.checkpoint.every_minutes is None and (between is None or between >= steps):
        yield f"{_ONLY_CHECKPOINT}. Set checkpoint.every_minutes, or an every_steps below the run's {steps:,}."
    every = config.measured_every(steps)
    if evaluates and every >= steps > 1:
        yield (
            f"held-out images are measured only at the end, as validation.every_steps is {every}. Try "
            f"validation.every_steps={max(1, steps // 10)}, or null."
        )


def remarks_on_time(config: RunConfig, seconds: float) -> Iterator[str]:
    """The same of what can be judged only once it is known how long the run takes.

    Args:
        config: the recipe.
        seconds: of all steps.
    """
    minutes = config.checkpoint.every_minutes
    if config.checkpoint.every_steps is None and minutes is not None and 60 * minutes >= seconds:
        yield (
            f"{_ONLY_CHECKPOINT}, as checkpoint.every_minutes is {minutes:g} and the run takes "
            f"{duration(seconds)}. A stop signal saves one, but a run that is killed starts from the beginning."
        )


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"
