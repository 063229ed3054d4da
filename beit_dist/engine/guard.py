"""Numbers that should stop a run or be looked at: losses that are not finite, losses that jump, ranks that differ.

That nothing is updated from a number that is not finite is the optimizers' part (all ranks agree on it before
the step). Here is what a person needs afterwards: which step, which ranks, which samples.
"""

from __future__ import annotations

import logging
import socket
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from beit_dist.config.run import GuardConfig
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.errors import TrainingError

_log = logging.getLogger(__name__)

KEPT_STEPS = 3
"""Steps whose losses and sample ids each rank keeps, to name them when the run is stopped."""
_SHOWN = 16  # sample ids in a message; FAILED has them all
_NORMAL = 1.4826  # standard deviation of a normal distribution in median absolute deviations
_LEAST_SPREAD = 1e-3  # of the median: losses that hardly differ are no measure of what is unusual


class LossWindow:
    """Judges each loss by the median and the median absolute deviation of those before it.

    A loss is a spike when it lies more than ``threshold`` robust standard deviations above the median of a full
    window. Spikes enter the window too: a level that lasts becomes the normal one after half a window.
    """

    def __init__(self, window: int, threshold: float, losses: Iterable[float] = ()) -> None:
        self._threshold = threshold
        self._losses = deque(losses, maxlen=window)

    @property
    def losses(self) -> list[float]:
        """The last losses, oldest first."""
        return list(self._losses)

    def is_spike(self, loss: float) -> bool:
        """Judge a loss, and take it into the window."""
        spike = False
        if len(self._losses) == self._losses.maxlen:
            median = statistics.median(self._losses)
            spread = _NORMAL * statistics.median(abs(other - median) for other in self._losses)
            spike = loss > median + self._threshold * max(spread, _LEAST_SPREAD * abs(median))
        self._losses.append(loss)
        return spike


class Guard:
    """The run's guard: notes what each step was made of, watches the losses, compares the ranks.

    Args:
        settings: what to watch.
        agreement: the ranks' CPU group.
        module: the model whose weights must be the same on all ranks.
        whole: every rank holds all weights (below ZeRO stage 3).
        metrics: rank 0's metrics; None on the other ranks.
        saved: ``state`` of the checkpoint that is continued.
        name_of: what a person calls a sample.
    """

    def __init__(
        self,
        settings: GuardConfig,
        agreement: Agreement,
        module: nn.Module,
        *,
        whole: bool,
        metrics: Metrics | None = None,
        saved: Mapping[str, Any] | None = None,
        name_of: Callable[[int], int | str] = int,
    ) -> None:
        saved = saved or {}
        self._name_of = name_of
        self._settings, self._agreement, self._module = settings, agreement, module
        self._metrics = metrics
        self._window = LossWindow(settings.window, settings.threshold, saved.get("window", ()))
        self._spikes = int(saved.get("spikes", 0))
        self._spike: str | None = saved.get("alarm") if settings.spikes == "stop" else None
        self._steps: deque[tuple[int, list[Tensor], Tensor]] = deque(maxlen=KEPT_STEPS)
        self._every = settings.check_parameters_every_steps if whole else None
        if metrics is not None:
            metrics.add("beit_train_loss_spikes", self._spikes)
        if settings.check_parameters_every_steps and not whole and agreement.ranks.rank == 0:
            _log.warning(
                "guard.check_parameters_every_steps: skipped, because at ZeRO stage 3 no rank holds all weights"
            )

    @property
    def alarm(self) -> str | None:
        """Rank 0: why the run is to be stopped at the next boundary, if it is."""
        if self._spike is None:
            return None
        way_out = (
            "Start again from an earlier checkpoint or with a lower optimizer.lr; guard.spikes=warn only warns."
        )
        return f"{self._spike}. {way_out}"

    @property
    def state(self) -> dict[str, Any]:
        """For the manifest: a run that is continued from it judges like one that never stopped."""
        return {"window": self._window.losses, "spikes": self._spikes, "alarm": self._spike}

    def note(self, step: int, losses: Sequence[Tensor], sample_ids: Tensor) -> None:
        """Keep what a step was made of: the micro-batches' loss sums, left on the device, and the samples.

        Args:
            step: number of the step.
            losses: one scalar for each micro-batch, in order.
            sample_ids: int64 (R,), this rank's rows; copied, the loader uses its memory again.
        """
        self._steps.append((step, [loss.detach() for loss in losses], sample_ids.clone()))

    def fetched(self, line: Mapping[str, Any]) -> None:
        """Rank 0: judge a step's loss, when the recorder has fetched it."""
        loss = line["loss"]
        if self._settings.spikes == "off" or loss is None:
            return
        before = self._window.losses
        if not self._window.is_spike(loss):
            return
        self._spikes += 1
        text = f"step {line['step']} has a loss of {loss:.4f}, the {len(before)} steps before it had a median of "
        text += f"{statistics.median(before):.4f}"
        _log.warning("loss spike: %s", text)
        if self._metrics is not None:
            self._metrics.add("beit_train_loss_spikes")
        if self._settings.spikes == "stop":
            self._spike = text

    def blame(self) -> tuple[str, list[dict[str, Any]]]:
        """Who and what made the kept steps' losses not finite, as a sentence and in full. Collective."""
        rank, host = self._agreement.ranks.rank, socket.gethostname()
        own = []
        for step, losses, ids in self._steps:
            for loss, rows in zip(losses, ids.chunk(len(losses)), strict=True):
                if not bool(torch.isfinite(loss)):
                    samples = [self._name_of(number) for number in rows.tolist() if number >= 0]
                    own.append({"step": step, "rank": rank, "host": host, "samples": samples})
        found = [fault for faults in self._agreement.gather(own) for fault in faults]
        last = self._steps[-1][0] if self._steps else 0
        named = [fault for fault in found if fault["step"] == last]
        if not named:
            return f"In step {last} the loss was finite on every rank: only its gradients were not.", found
        return f"In step {last} the loss was not finite on {'; on '.join(map(_in_words, named[:_SHOWN]))}.", found

    def check_parameters(self, step: int) -> None:
        """Compare all ranks' weights every ``guard.check_parameters_every_steps`` steps. Collective.

        Raises:
            TrainingError: they differ.
        """
        if not self._every or step % self._every:
            return
        digests = self._agreement.gather(digest(self._module))
        usual, votes = Counter(digests).most_common(1)[0]
        others = [rank for rank, other in enumerate(digests) if other != usual]
        if others:
            alone = f"ranks {others} hold" if len(others) > 1 else f"rank {others[0]} holds"
            raise TrainingError(
                f"after step {step} {alone} different weights from the other {votes}. The usual cause is faulty "
                "hardware, or a library that differs between hosts. Start again from a checkpoint, without that "
                "host."
            )

    def close(self) -> None:
        """Let go of the kept steps."""
        self._steps.clear()


@torch.no_grad()
def digest(module: nn.Module) -> tuple[int, int]:
    """Two sums over the bits of all parameters, one of them weighted by position: cheap, on the device."""
    sums = []
    for number, parameter in enumerate(module.parameters(), start=1):
        kind = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
        bits = parameter.detach().reshape(-1).view(kind).to(torch.int64)
        places = torch.arange(len(bits), device=bits.device) % 65521 + number
        sums.append(torch.stack([bits.sum(), (bits * places).sum()]))
    first, second = torch.stack(sums).sum(0).tolist()  # int64 sums wrap around, alike everywhere
    return first, second


def _in_words(fault: Mapping[str, Any]) -> str:
    samples = fault["samples"]
    more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    return f"rank {fault['rank']} ({fault['host']}), samples {', '.join(map(str, samples[:_SHOWN]))}{more}"
