"""Fine-tuning as a task: what classification and segmentation have in common."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.engine.fast_paths import FastPaths
from beit_dist.engine.memory import state_shapes
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.schedule import steps_of
from beit_dist.engine.task import Described, Fetched, Needs, Running, Step, Surroundings, Task
from beit_dist.errors import CheckpointError, ConfigError, DataError
from beit_dist.images.labelled.views import Images, View
from beit_dist.images.left_out import LeftOut
from beit_dist.models.layer_decay import layer_groups
from beit_dist.stream.labelled.batches import LabelledBatch, LabelledBatches, shared_memory_bytes
from beit_dist.stream.parts import drop_path_depth
from beit_dist.tasks.finetuning import describing
from beit_dist.tasks.finetuning.measured_model import MeasuredModel
from beit_dist.weights.foreign import Foreign
from beit_dist.weights.origin import KINDS, finetuned_from_file, finetuned_from_run
from beit_dist.weights.stored import StoredWeights

RowsT = TypeVar("RowsT")


class Data(NamedTuple, Generic[Images]):
    """Labelled images."""

    training: Images
    held_out: Images | None
    """Of the same classes."""


class Finetuning(Task[FinetuningConfig, LabelledBatch, RowsT], Generic[Images, RowsT]):
    """Fine-tuning of a BEiT backbone on labelled images (arXiv 2106.08254, section 2.6).

    The order of images, every augmentation and every dropped branch is keyed by (seed, epoch, image), so a resumed
    run equals one that was never stopped, on other ranks too.
    """

    frozen = (
        "task",
        "model",
        "seed",
        "optimizer.name",
        "segmentation.channels",
        "segmentation.auxiliary_channels",
    )
    other_origins = KINDS
    shown = (
        *Task.shown,
        *("layer_decay", "label_smoothing", "augmentation", "mixing", "views", "segmentation"),
    )

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config)
        self.left_out = LeftOut()
        self._batches: LabelledBatches[Images] | None = None
        self._around: Surroundings
        self._running: Running

    @cached_property
    def data(self) -> Data[Images]:
        """The images, found when they are first asked for.

        Raises:
            ConfigError, DataError: a source cannot be used.
        """
        return self.find()

    @abstractmethod
    def find(self) -> Data[Images]:
        """Look for the images."""

    @property
    @abstractmethod
    def view(self) -> View[Images]:
        """How images are augmented, and measured."""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names. Set, where a model is looked at without any images."""
        return self.data.training.classes

    # ------------------------------------------------------------------------------------- before the ranks join

    def check(self, ranks: Ranks) -> None:
        """Find the images."""
        self.epoch_samples = len(self.data.training)
        if ranks.rank == 0:
            for line in self.left_out.lines():
                print(line, flush=True)

    def describe_model(self, resolved: Resolved) -> Described:
        """Sizes, input and objective."""
        yield from describing.model_rows(self.config)

    def describe_data(self, resolved: Resolved) -> Described:
        """The images; none is read."""
        self.check(Ranks(world=resolved.ranks))
        steps = steps_of(self.config, self.epoch_samples)
        yield from describing.data_rows(self.config, *self.data, steps)

    def introduce(self, steps: int) -> Described:
        """The model and the images."""
        yield from describing.model_rows(self.config)
        yield from describing.data_rows(self.config, *self.data, steps)

    def next_commands(self) -> Sequence[str]:
        """Take the weights elsewhere."""
        run = shlex.quote(self.config.run)
        return (f"beit pictures {run}", f"beit export {run} --to safetensors --out exported/")

    @property
    def way_to_measure(self) -> str:
        """See :attr:`Task.way_to_measure`."""
        return "give validation.data, labelled images that are not trained on"

    @property
    def paths(self) -> FastPaths:
        """Those of the recipe."""
        return FastPaths.of(self.config, self.config.model)

    @property
    def copies(self) -> int:
        """A model of its own to measure with, where it is not the engine's."""
        return int(self.config.ema.decay is not None)

    # ---------------------------------------------------------------------------------------- the ranks have met

    def prepare(self, around: Surroundings, saved: Mapping[str, Any] | None) -> None:
        """See that all ranks have found the same images, and those of the run."""
        self._around = around
        own = {"data": self.data.training.digest}
        if self.data.held_out is not None:
            own["validation.data"] = self.data.held_out.digest
        everyone = around.agreement.gather(own)
        for name, digest in own.items():
            if any(theirs[name] != digest for theirs in everyone):
                raise DataError(f"{name}: the ranks see different images. Copy the same ones to every host")
        self.take_up(saved)

    def take_up(self, saved: Mapping[str, Any] | None) -> None:
        """Refuse other images than those of the run; the position is the number of samples.

        Raises:
            CheckpointError: they are others.
        """
        if saved is not None and saved["dataset"] != self.data.training.digest:
            known = tuple(saved["classes"])
            what = "other classes" if known != self.classes else "other images"
            raise CheckpointError(
                f"run {self.config.run} cannot be continued: {describing.source(self.config.data)} holds {what} "
                "than it was trained on. Restore them, or choose another run folder."
            )

    def needs(self, resolved: Resolved) -> Needs:
        """Of one step made ahead."""
        config = self.config
        one = config.loader.model_copy(update={"prefetch": 1})
        depth = drop_path_depth(config.model.drop_path_rates)
        return Needs(shared=shared_memory_bytes(self.view, resolved.rank_batch, one, depth))

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """By layer, as in unilm."""
        config = self.config
        return layer_groups(model, config.optimizer.weight_decay, config.layer_decay, config.model.depth)

    def from_stored(self, stored: StoredWeights, *, loud: bool) -> Foreign | None:
        """Of a run of any kind with a backbone; see :func:`beit_dist.weights.origin.as_finetuned`."""
        return finetuned_from_run(stored, self.config.model, state_shapes(self), self.classes)

    def foreign(self, source: str) -> Foreign:
        """Of Hugging Face, timm or unilm, pre-trained or fine-tuned."""
        return finetuned_from_file(source, self.config.model, state_shapes(self), self.classes)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The images and their classes."""
        return {"dataset": self.data.training.digest, "classes": list(self.classes)}

    def open(self, running: Running) -> None:
        """Begin to decode and augment images."""
        config, around = self.config, self._around
        self._running = running
        self._measured_model = MeasuredModel(self, running, around)
        self._batches = LabelledBatches(
            self.data.training,
            self.view,
            rows=around.rows,
            global_batch=config.global_batch,
            samples=running.progress.samples,
            seed=config.seed,
            drop_path_rates=config.model.drop_path_rates,
            loader=config.loader,
            access=config.storage.access,
            pin=around.device.type == "cuda",
            ranks_on_node=running.ranks_on_host,
        )

    # ------------------------------------------------------------------------------------------------- the steps

    def fetch(self, following: bool) -> Fetched:
        """The loader's next batch, and of it what the ranks sum: its weight and its digest."""
        assert self._batches is not None
        stop = self._around.stop
        batch: LabelledBatch | None = self._batches.next_unless(lambda: stop.known)
        if batch is None:
            return Fetched(None, [0, 0, 0])
        # 64 bits in halves, so that sums over any number of ranks stay below 2⁶³.
        integers = [self.weight(batch), batch.digest % 2**32, batch.digest >> 32]
        return Fetched(batch, integers, batch.wait_seconds, batch.samples)

    def name_of(self, sample: int) -> int | str:
        """The image's."""
        return str(self.data.training.files[sample])

    def begin(self, batch: LabelledBatch, summed: Sequence[int]) -> Step:
        """The weight, and a digest of what the batch is made of."""
        weight, low, high = summed
        return Step(weight, {"batch": f"{(low + (high << 32)) % 2**64:016x}"})

    @abstractmethod
    def weight(self, batch: LabelledBatch) -> int:
        """What this rank's rows add to the step's weight."""

    def part(self, batch: LabelledBatch, low: int) -> tuple[slice, Tensor | None]:
        """A micro-batch's rows from ``low`` on, and their stochastic-depth keeps on the device."""
        rows = slice(low, low + self._around.resolved.micro_batch)
        keeps = None if batch.keeps is None else batch.keeps[rows].to(self._around.device, non_blocking=True)
        return rows, keeps

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out images."""
        return self.data.held_out is not None

    def measured_samples(self) -> int | None:
        """How many held-out images are measured now: all (None) behind the last step."""
        running = self._running
        return None if running.progress.step >= running.total_steps else self.config.validation.samples

    def position(self) -> Mapping[str, Any]:
        """Nothing besides: images, augmentations and mixtures follow from the number of samples alone."""
        return {}

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()


def refuse_odd_ranks(config: FinetuningConfig, ranks: int) -> None:
    """Pairs are mixed on one rank.

    Raises:
        ConfigError: a rank's share of the batch is odd.
    """
    if config.mixing.active and config.global_batch % (2 * ranks):
        raise ConfigError(
            "global_batch",
            config.global_batch,
            f"a multiple of {2 * ranks}, as images are mixed in pairs on each of {ranks} ranks",
            "mixing.probability=0 mixes none.",
        )
