"""What a kind of training is made of. The loop, checkpoints, metrics and all else are the same for every kind.

One rule unifies the losses: a step's gradient is that of Σ(loss of a row) / weight, where the weight is counted
over the global batch: masked patches, images, labelled pixels. A task gives sums and the weight, and never scales;
the trainer alone does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from beit_dist.config.run import RunConfig
from beit_dist.engine.compiled import compile_blocks
from beit_dist.engine.fast_paths import FastPaths
from beit_dist.engine.metrics import Metric, Metrics
from beit_dist.engine.precision import settle, settle_alone
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.ranks.preemption import StopRequest
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.run_folder import RunFolder
from beit_dist.step_numbers import KnownBaselines, Number
from beit_dist.weights.foreign import Foreign
from beit_dist.weights.stored import StoredWeights

OPERATIONS = 6
"""For each multiply-add of a forward pass: it is two operations, and the backward pass takes two products for each
of the forward's. (The pixels need no gradient, so the first layer's takes only one: counted in full, as published
figures are.)"""
Described = Iterable[tuple[str, str]]
"""Lines of ``--dry-run``: a subject, and what there is to say of it."""


@dataclass
class Progress:
    """Where a run is. Everything else follows from it, the recipe, and the task's own position."""

    step: int = 0
    """Optimizer steps attempted."""
    samples: int = 0
    """Samples trained on."""
    first_batch: int = 0
    """Global batch of the run's first start, the unit of the schedule's time."""
    counters: dict[str, int] = field(default_factory=lambda: {"skipped": 0})
    """Steps without an update, and the task's numbers that are counters."""

    def count(self, numbers: Sequence[Number], known: Mapping[str, Any]) -> None:
        """Add what a step's numbers that are counters come to."""
        for number in numbers:
            if number.kind == "counter":
                self.counters[number.name] += known[number.name]

    @property
    def time(self) -> float:
        """In first batches, so that a run continued with another global batch keeps its place in the schedule."""
        return self.samples / self.first_batch


@dataclass(frozen=True)
class Surroundings:
    """What a start has that a task works in."""

    agreement: Agreement
    device: torch.device
    resolved: Resolved
    stop: StopRequest
    """``known`` asks this rank and the store of the ranks, ``requested`` is for the ranks to agree on."""
    alive: Callable[[], None]
    """To be called now and then by what takes long."""

    @property
    def ranks(self) -> Ranks:
        """This process among all."""
        return self.agreement.ranks

    @property
    def rows(self) -> range:
        """This rank's rows of the global batch."""
        size = self.resolved.rank_batch
        return range(self.ranks.rank * size, (self.ranks.rank + 1) * size)


@dataclass(frozen=True)
class Running:
    """What a task works with once the engine is there."""

    engine: Any
    progress: Progress
    total_steps: int
    """Where the run ends."""
    run: RunFolder
    ranks_on_host: int
    weights: Callable[[], dict[str, Tensor]]
    """The averaged weights if there are any, else the trained ones: whole and fp32 on every rank. Collective."""
    others_wait: Callable[[], AbstractContextManager[None]]
    """Around a collective inside :meth:`Task.forward`: what is waited for there is not this rank's own time."""


class Fetched(NamedTuple):
    """A rank's rows of the next global batch."""

    batch: Any
    """None: a stop request came while there was none."""
    integers: Sequence[int]
    """To be summed over the ranks, as many on each."""
    wait_seconds: float = 0.0
    """How long the rank waited for it."""
    samples: Tensor | None = None
    """int64 (R,): which samples the rows are, to be named when a step goes wrong; negative ones are not."""


@dataclass(frozen=True)
class Step:
    """What the host knows of a step before it is taken."""

    weight: int
    """What the sums are divided by; 0 trains on nothing."""
    known: Mapping[str, Any]
    """Numbers and texts for the step's line: those of :attr:`Task.known`, and others."""


class Sums(NamedTuple):
    """What a micro-batch gives, on the device."""

    loss: Tensor
    """Sum over the rows, to be differentiated."""
    numbers: Sequence[Tensor]
    """Scalars: the sums of :attr:`Task.numbers`."""
    tally: Tensor | None = None
    """int64 counts, summed over micro-batches and ranks and given to :meth:`Task.tallied`."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a rank needs. A task gives what it needs besides the engine's state and checkpoints."""

    model: int = 0
    """Where the model is."""
    shared: int = 0
    """/dev/shm for one step read ahead."""
    copy: int = 0
    """Memory of the host for the copy that a checkpoint is written from; the preflight adds it."""
    blocks: int = 0
    """Memory of the host for what is fetched ahead."""
    blocks_setting: str = ""
    """What to lower for less of it."""


class StartStopped(Exception):  # noqa: N818 (nothing went wrong)
    """All ranks agree that a stop request came before the first step."""


BatchT = TypeVar("BatchT")
RowsT = TypeVar("RowsT")
ConfigT = TypeVar("ConfigT", bound=RunConfig)


class Task(ABC, Generic[ConfigT, BatchT, RowsT]):
    """A kind of training. Methods come in the order in which a start calls them; all ranks call them alike."""

    kind: ClassVar[str]
    """In every manifest, ``run.json`` and metrics."""
    frozen: ClassVar[tuple[str, ...]]
    """Settings and sections that make another run."""
    other_origins: ClassVar[tuple[str, ...]] = ()
    """Other kinds of runs that ``init_from`` may name."""
    shown: ClassVar[tuple[str, ...]] = ("optimizer", "epochs", "steps", "global_batch", "ema")
    """Settings that may change on resume, and change what is learnt: the difference is printed."""

    numbers: tuple[Number, ...]
    """What a step sums on the device, divided by its weight; the first is the loss."""
    known: tuple[Number, ...] = ()
    """What the host knows of a step."""
    measured: tuple[Number, ...] = ()
    """What :meth:`evaluate` measures."""
    metrics: tuple[Metric, ...] = ()
    """Exported besides those numbers, by :meth:`export`."""

    epoch_samples: int
    """Samples of an epoch; known once :meth:`check` has been called, to the last one after :meth:`prepare`."""
    views: int = 1
    """Versions of each sample, of which an epoch sees one; known as soon."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    # ------------------------------------------------------------------------------------- before the ranks join

    @abstractmethod
    def check(self, ranks: Ranks) -> None:
        """Refuse what every rank would find wrong alike: data, files, settings. Sets :attr:`epoch_samples`."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The model without values, for a look at its shapes on the meta device."""

    @abstractmethod
    def describe_model(self, resolved: Resolved) -> Described:
        """What ``--dry-run`` says of model and objective."""

    @abstractmethod
    def describe_data(self, resolved: Resolved) -> Described:
        """What ``--dry-run`` says of the data; sets :attr:`epoch_samples`. Nothing where none is given."""

    def introduce(self, steps: int) -> Described:
        """What a run of so many steps says of model and data before the first, once :meth:`prepare` was called."""
        return ()

    def next_commands(self) -> Sequence[str]:
        """What to do with a run that is done."""
        return ()

    @property
    @abstractmethod
    def multiply_adds(self) -> int:
        """Of one sample's forward pass."""

    @property
    def paths(self) -> FastPaths | None:
        """How the blocks of a backbone are computed; None for a model without one."""
        return None

    @property
    def copies(self) -> int:
        """Copies of the weights, in fp32 and whole, that a rank keeps besides the engine's."""
        return 0

    @abstractmethod
    def activation_bytes(self, resolved: Resolved) -> int:
        """Estimate of what a micro-batch keeps for its backward pass."""

    def activation_parts(self, resolved: Resolved) -> Mapping[str, int]:
        """What :meth:`activation_bytes` is the sum of, by name."""
        return {"activations": self.activation_bytes(resolved)}

    def settle_alone(self, resolved: Resolved, saved: Mapping[str, Any] | None) -> Resolved:
        """What :meth:`settle` gives where all ranks' devices are like this machine's."""
        return settle_alone(resolved, saved["precision"] if saved else None)

    # ---------------------------------------------------------------------------------------- the ranks have met

    def finished(self, run: RunFolder) -> str | None:
        """Rank 0: what to say where there is nothing left to do, before the run folder is touched."""
        return None

    def settle(
        self, resolved: Resolved, saved: Mapping[str, Any] | None, agreement: Agreement, device: torch.device
    ) -> Resolved:
        """``resolved`` in a precision by name. Collective.

        Args:
            saved: manifest of the checkpoint that is continued.
        """
        return settle(resolved, saved["precision"] if saved else None, agreement, device)

    @abstractmethod
    def prepare(self, around: Surroundings, saved: Mapping[str, Any] | None) -> None:
        """Look at the data, before anything is made. Collective.

        What is refused here, all ranks refuse alike.

        Args:
            saved: manifest of the checkpoint that will be continued.

        Raises:
            StartStopped: a rank was asked to stop meanwhile.
            CheckpointError: the run is another one.
        """

    @abstractmethod
    def take_up(self, saved: Mapping[str, Any] | None) -> None:
        """Take up the position that the manifest ``saved`` tells, or begin."""

    @abstractmethod
    def needs(self, resolved: Resolved) -> Needs:
        """Memory that a rank needs, for the preflight."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The model with its initial values, the same on every rank."""

    @abstractmethod
    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The optimizer's groups: ``name``, ``params`` as (name, parameter), ``weight_decay``.

        And ``lr_share``, of the schedule's learning rate, where a group does not have all of it.
        """

    def compile(self, model: nn.Module, device: torch.device) -> None:
        """Have what is worth it compiled at its first call (``compile: true``)."""
        compile_blocks(model)

    def from_stored(self, stored: StoredWeights, *, loud: bool) -> Foreign | None:
        """Weights of a run, for ``init_from``; refused where they mean something else.

        None: its parameters are those of this model, and are read part by part.

        Args:
            stored: of one of the kinds in :attr:`other_origins`, or of this one.
            loud: print what they mean otherwise and may.
        """
        return None

    @abstractmethod
    def foreign(self, source: str) -> Foreign:
        """Weights for ``init_from`` from a file that is no run's; refused where they mean something else."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What every manifest says of the task besides its position."""
        return {}

    @abstractmethod
    def open(self, running: Running) -> None:
        """Begin to read data."""

    def begun(self, metrics: Metrics) -> None:
        """Rank 0: set what is exported and does not change."""

    # ------------------------------------------------------------------------------------------------- the steps

    @abstractmethod
    def fetch(self, following: bool) -> Fetched:
        """This rank's rows of the next step.

        Args:
            following: the step before is still under way, and :meth:`finish` was not called for it yet.
        """

    @abstractmethod
    def begin(self, batch: BatchT, summed: Sequence[int]) -> Step:
        """The step's weight and what is known of it, from the ranks' summed integers."""

    @abstractmethod
    def rows(self, batch: BatchT) -> Iterator[RowsT]:
        """The micro-batches of a batch, on the device."""

    @abstractmethod
    def forward(self, rows: RowsT, step: Step) -> Sums:
        """Loss and numbers of a micro-batch, by the engine."""

    def average_limit(self, step: int) -> float:
        """The most of the average's decay after so many steps."""
        return 1.0

    def name_of(self, sample: int) -> int | str:
        """What a person calls one of the samples of :attr:`Fetched.samples`."""
        return sample

    def finish(self) -> None:
        """The step has been taken: advance the position."""

    def tallied(self, step: int, tally: Any) -> Mapping[str, Any]:
        """Rank 0: what a step's counts over all ranks, an int64 array, add to its line."""
        return {}

    def export(self, metrics: Metrics) -> None:
        """Rank 0, at each fetch: count what is in :attr:`metrics`."""

    @property
    def alarm(self) -> str | None:
        """Rank 0: why the run must stop and fail, if it must."""
        return None

    @property
    def blame(self) -> str:
        """What to do about gradients that are not finite."""
        return "Lower optimizer.lr, or raise max_skipped_in_a_row."

    @property
    def way_to_measure(self) -> str:
        """What to do so that there is held-out data."""
        return "give validation.data"

    @property
    def evaluates(self) -> bool:
        """Whether there is held-out data."""
        return True

    def is_due(self, step: int, steps: int) -> bool:
        """Whether held-out data is measured after a step of a run of so many."""
        return step == steps or step % self.config.measured_every(steps) == 0

    def baselines(self) -> KnownBaselines:
        """Rank 0, once :meth:`check` was called: what the numbers come to without learning from images."""
        return KnownBaselines()

    @abstractmethod
    def evaluate(self, step: int) -> Mapping[str, Any] | None:
        """The numbers of :attr:`measured` on held-out data, and others for its line; the same on every rank.

        Collective. None: a rank was asked to stop meanwhile, which all ranks know.
        """

    @abstractmethod
    def position(self) -> Mapping[str, Any]:
        """What a manifest says of where the task is, besides steps and samples."""

    def conclude(self) -> Mapping[str, Any]:
        """The run is done: write what it was for. Collective; on rank 0, what the marker says of it."""
        return {}

    def close(self) -> None:
        """Let go of the data."""
