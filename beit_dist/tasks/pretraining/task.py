"""Masked image modelling as a task: predict masked patches of samples that come from shards in one order."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.fast_paths import FastPaths
from beit_dist.engine.metrics import Metric, Metrics
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.schedule import steps_of
from beit_dist.engine.task import Described, Fetched, Needs, Running, Step, Sums, Surroundings, Task
from beit_dist.engine.transfer import Rows, Transfer
from beit_dist.errors import DataError, SampleError
from beit_dist.models.flops import multiply_adds
from beit_dist.models.heads.targets import head_of
from beit_dist.models.mim import MaskedImageModel
from beit_dist.models.unfilled import unfilled
from beit_dist.probing.pictures import Pictures
from beit_dist.shards.manifest import Manifest
from beit_dist.step_numbers import KnownBaselines, Number
from beit_dist.storage.place import is_url
from beit_dist.stream.batches import RankBatch, RankBatches
from beit_dist.stream.counts import COUNTERS
from beit_dist.stream.held import ring_of, shared_memory_bytes
from beit_dist.stream.masking.modes import masks_of
from beit_dist.stream.parts import drop_path_depth
from beit_dist.stream.plan import Plan
from beit_dist.tasks.pretraining import describing
from beit_dist.tasks.pretraining.dataset import HeldOut, build_plan, known_baselines, open_data, open_validation
from beit_dist.tasks.pretraining.measuring import Measuring
from beit_dist.tasks.pretraining.probe import beside, open_probe, probe_row, probed
from beit_dist.weights.foreign import Foreign, read_foreign
from beit_dist.weights.names import is_pretraining_only
from beit_dist.weights.origin import check_meaning, meaning_of, reminders
from beit_dist.weights.stored import StoredWeights

"""A micro-batch: patches, tokens, positions, keeps."""

KNOWN = (
    Number(name="masked", help="Masked patches predicted.", metric="beit_train_masked_patches", kind="counter"),
    Number(
        name="bad",
        help="Damaged samples, which were given weight 0.",
        metric="beit_data_bad_samples",
        kind="counter",
    ),
)
METRICS = (
    Metric(
        "beit_data_read_bytes", "counter", "Bytes of shards read for rank 0: disk, store or cache.", ("source",)
    ),
    Metric(
        "beit_data_cache_lookups",
        "counter",
        "Blocks looked up in loader.cache_dir for rank 0: hit, miss, damaged or failed.",
        ("result",),
    ),
    Metric(
        "beit_data_samples_read_again",
        "counter",
        "Samples of rank 0 that were damaged when first read, by what a second read found: whole or damaged.",
        ("result",),
    ),
    Metric(
        "beit_storage_retries",
        "counter",
        "Requests to a store that rank 0 and its loaders sent again.",
        ("cause",),
    ),
)


class Pretraining(Task[PretrainingConfig, RankBatch, Rows]):
    """Pre-training of a BEiT model on shards of patches and visual tokens (arXiv 2106.08254).

    Raises:
        ConfigError: the recipe names a mask mode or a target that is in no table, or its masks cannot be made.

    The data set and the order of samples are compared by the plan's digests, in :meth:`prepare`.
    """

    kind = "pretraining"
    frozen = ("model", "masking", "seed", "optimizer.name")
    known, metrics = KNOWN, METRICS

    manifest: Manifest
    plan: Plan

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__(config)
        self.masks = masks_of(config.masking, config.model.grid, config.seed)
        self.numbers = head_of(config.model).numbers
        self.measured = (*self.numbers, *probed(config))
        self._held_out: HeldOut | None = None
        self._labelled: Pictures | None = None
        self._consumed = 0  # samples of each lane: the position in the plan
        self._bad = 0
        self._batches: RankBatches | None = None
        self._measuring: Measuring | None = None

    # ------------------------------------------------------------------------------------- before the ranks join

    def check(self, ranks: Ranks) -> None:
        """Open both data sets and look for their files."""
        config = self.config
        self.manifest = open_data(config, check_files=_checks(config.data, ranks))
        where = config.data if config.validation.data == "auto" else config.validation.data
        self._held_out = open_validation(config, self.manifest, check_files=_checks(where, ranks))
        self._labelled = open_probe(config)
        self.epoch_samples, self.views = self.manifest.samples, self.manifest.views

    def network(self) -> MaskedImageModel:
        """The backbone and its head."""
        return MaskedImageModel(self.config.model, recompute=self.config.activation_checkpointing)

    def describe_model(self, resolved: Resolved) -> Described:
        """Sizes, input, masks and lanes."""
        return describing.model_rows(self.config, resolved, self.masks)

    def describe_data(self, resolved: Resolved) -> Described:
        """The shards, their order, and what reading takes."""
        self.check(Ranks())
        plan = build_plan(self.config, self.manifest)
        yield from describing.data_rows(self.config, resolved, self.manifest, plan, self.masks)
        steps = steps_of(self.config, plan.samples)
        yield describing.held_out_row(self.config, self._held_out, steps)
        if self._labelled is not None:
            yield probe_row(self.config, self._labelled, steps)

    def introduce(self, steps: int) -> Described:
        """The model, what it predicts, and the data."""
        yield from describing.introduction_rows(
            self.config, self.plan, self.manifest, self._held_out, self.masks, steps
        )
        if self._labelled is not None:
            yield probe_row(self.config, self._labelled, steps)

    def next_commands(self) -> Sequence[str]:
        """Look at what was learnt, and take the weights elsewhere."""
        run = shlex.quote(self.config.run)
        return (f"beit pictures {run}", f"beit export {run} --to hf --out exported/")

    @property
    def multiply_adds(self) -> int:
        """Backbone, and head on the masked patches."""
        return multiply_adds(self.config.model, describing.most_masked(self.config, self.masks))

    @property
    def paths(self) -> FastPaths:
        """Those of the recipe."""
        return FastPaths.of(self.config, self.config.model)

    @property
    def copies(self) -> int:
        """Those of the weights that are probed."""
        return int(self.config.validation.probe.data is not None)

    def activation_bytes(self, resolved: Resolved) -> int:
        """Of the backbone and of the head."""
        return sum(self.activation_parts(resolved).values())

    def activation_parts(self, resolved: Resolved) -> Mapping[str, int]:
        """See :func:`beit_dist.tasks.pretraining.describing.activation_parts`."""
        return describing.activation_parts(self.config, resolved, self.masks)

    # ---------------------------------------------------------------------------------------- the ranks have met

    def prepare(self, around: Surroundings, saved: Mapping[str, Any] | None) -> None:
        """Plan the order of samples, or see that it is that of the run."""
        self._around = around
        self.take_up(saved)
        _check_alike(around, "validation.data", self._held_out and self._held_out.manifest.digest)
        _check_alike(around, "validation.probe.data", self._labelled.digest[0] if self._labelled else None)

    def take_up(self, saved: Mapping[str, Any] | None) -> None:
        """The order of samples, and how many of it were consumed."""
        self.plan = build_plan(self.config, self.manifest, saved["plan"] if saved else None)
        if saved is not None:
            self._consumed, self._bad = saved["position"]["consumed"], saved["counters"]["bad"]

    def needs(self, resolved: Resolved) -> Needs:
        """Of one step read ahead; of a rank whose lanes others share, as much as of the first."""
        config = self.config
        shared = shared_memory_bytes(
            layout=self.manifest.layout,
            positions=self.masks.positions_per_image,
            rank_rows=resolved.rank_batch,
            loader=config.loader.model_copy(update={"prefetch": 1}),
            depth=drop_path_depth(config.model.drop_path_rates),
        )
        ring = 0
        if is_url(str(config.data)):
            ring = ring_of(self.plan, self.manifest.layout, range(resolved.rank_batch), self._per_lane)
        if ring > config.loader.memory_gib * 2**30:
            ring = 0  # then samples are fetched, one by one
        return Needs(shared=shared, blocks=ring, blocks_setting="loader.memory_gib")

    def model(self) -> nn.Module:
        """The network, initialised from the seed."""
        model = unfilled(self.network)
        model.initialise(self.config.seed)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """As in unilm: vectors, biases, the class token and absolute positions are not decayed."""
        assert isinstance(model, MaskedImageModel)
        return model.parameter_groups(self.config.optimizer.weight_decay)

    def compile(self, model: nn.Module, device: torch.device) -> None:
        """The blocks, and on a GPU the loss: 3 % there, and on a CPU nothing that could be measured."""
        super().compile(model, device)
        if device.type == "cuda" and isinstance(model, MaskedImageModel):
            model.compile_score()

    def from_stored(self, stored: StoredWeights, *, loud: bool) -> Foreign | None:
        """Heads and the normalisation of pixels give the same shapes another meaning."""
        check_meaning(self.config.model, meaning_of(stored))
        tokens = self.config.model.target == "tokens"
        if loud and tokens and stored.saved.manifest["tokenizer"] != self.manifest.tokenizer:
            print(
                "init_from: that run was trained on the tokens of another tokenizer, so its head predicts those",
                flush=True,
            )
        return None

    def foreign(self, source: str) -> Foreign:
        """Weights of Hugging Face, timm or unilm.

        Only what pre-training alone needs, the mask token and the head, and the last norm, which fine-tuning
        drops, may be missing.
        """
        model = self.config.model
        found = read_foreign(source, model)
        check_meaning(model, found.known)
        ours = [name for name, _ in self.network().named_parameters()]
        may_lack = [name for name in ours if is_pretraining_only(name, model)]
        return replace(
            found,
            notes=[*found.notes, *reminders(model, found)],
            may_lack=(*may_lack, "norm.weight", "norm.bias"),
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        """Data set, tokenizer and order."""
        manifest = self.manifest
        return {"dataset": manifest.digest, "tokenizer": manifest.tokenizer, "plan": self.plan.constants()}

    def open(self, running: Running) -> None:
        """Start the loader at the position."""
        config, around = self.config, self._around
        self._running = running
        self._transfer = Transfer(around.device)
        self._batches = RankBatches(
            root=str(config.data),
            manifest=self.manifest,
            plan=self.plan,
            masks=self.masks,
            drop_path_rates=config.model.drop_path_rates,
            global_batch=config.global_batch,
            rank=around.ranks.rank,
            world=around.ranks.world,
            consumed=self._consumed,
            loader=config.loader,
            pin=around.device.type == "cuda",
            ranks_on_node=running.ranks_on_host,
            access=config.storage.access,
        )
        self._measuring = Measuring(config, self._held_out, self._labelled, self.masks, around)

    # ------------------------------------------------------------------------------------------------- the steps

    def fetch(self, following: bool) -> Fetched:
        """The loader's next batch, and of it what the ranks sum: masked patches, damaged samples, its digest."""
        assert self._batches is not None
        stop = self._around.stop
        batch = self._batches.next_unless(lambda: stop.known)
        if batch is None:
            return Fetched(None, [0, 0, 0, 0])
        expected = self._consumed + (self._per_lane if following else 0)
        if batch.consumed != expected:
            raise RuntimeError(f"the stream is at {batch.consumed}, the trainer at {expected}")
        # 64 bits in halves, so that sums over any number of ranks stay below 2⁶³.
        integers = [batch.masked, batch.bad, batch.digest % 2**32, batch.digest >> 32]
        self._coming = (batch, self._transfer.send(self._micro_batches(batch)))
        return Fetched(batch, integers, batch.wait_seconds, batch.sample_ids)

    def begin(self, batch: RankBatch, summed: Sequence[int]) -> Step:
        """The weight is the number of masked patches."""
        masked, bad, low, high = summed
        self._bad += bad
        if self._bad > self.config.loader.bad_samples:
            raise SampleError(
                f"{self._bad} damaged samples, more than the {self.config.loader.bad_samples} that "
                f"loader.bad_samples allows. Find them with beit check {self.config.data}"
            )
        digest = (low + (high << 32)) % 2**64
        return Step(masked, {"masked": masked, "bad": bad, "batch": f"{digest:016x}"})

    def rows(self, batch: RankBatch) -> Iterator[Rows]:
        """(patches, tokens, positions, keeps) of a micro-batch, on their way since the batch was fetched."""
        fetched, rows = self._coming
        if fetched is not batch:
            raise RuntimeError("the trainer takes another batch than it fetched last")
        return rows

    def _micro_batches(self, batch: RankBatch) -> Iterator[Rows]:
        size = self._around.resolved.micro_batch
        tensors = (batch.patches, batch.tokens, batch.positions, batch.keeps)
        for low in range(0, self._around.resolved.rank_batch, size):
            yield tuple(None if tensor is None else tensor[low : low + size] for tensor in tensors)

    def forward(self, rows: Rows, step: Step) -> Sums:
        """The sums over the masked patches."""
        output = self._running.engine(*rows)
        if len(output) != len(self.numbers):
            raise ValueError(f"the head gives {len(output)} sums, and declares {len(self.numbers)} numbers")
        return Sums(output[0], output)

    def finish(self) -> None:
        """Every lane has given its share."""
        self._consumed += self._per_lane

    def export(self, metrics: Metrics) -> None:
        """What reading took."""
        for name, (counts, label) in COUNTERS.items():
            for value, count in counts.take().items():
                metrics.add(name, count, **{label: value})

    @property
    def way_to_measure(self) -> str:
        """See :attr:`Task.way_to_measure`."""
        return "make shards with --held-out, or give validation.data"

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out images, or labelled ones."""
        return self._held_out is not None or self._labelled is not None

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the loss on held-out images is measured after a step, or features are probed."""
        assert self._measuring is not None
        return self._measuring.is_due(step, steps)

    def baselines(self) -> KnownBaselines:
        """From the statistics of the data sets, where they have any, and the labels of probed images."""
        return beside(known_baselines(self.config, self.manifest, self._held_out), self._labelled)

    def evaluate(self, step: int) -> Mapping[str, Any] | None:
        """The head's numbers on held-out samples, and those of the probes."""
        assert self._measuring is not None
        running = self._running
        return self._measuring.measure(step, running.total_steps, running.engine.module, running.weights)

    def position(self) -> Mapping[str, Any]:
        """One integer, from which the plan tells the rest."""
        return {"consumed": self._consumed}

    def close(self) -> None:
        """End the loader."""
        if self._batches is not None:
            self._batches.close()
        if self._measuring is not None:
            self._measuring.close()

    @property
    def _per_lane(self) -> int:
        return self.config.global_batch // self.plan.lanes


def _check_alike(around: Surroundings, field: str, digest: str | None) -> None:
    """Refuse images that are others on some ranks, which would measure other numbers, or wait for nobody."""
    found = around.agreement.gather(digest)
    if len(set(found)) > 1:
        where = ", ".join(f"rank {rank} {(digest or 'none')[:12]}" for rank, digest in enumerate(found))
        raise DataError(
            f"{field}: the ranks see different held-out images ({where}). Copy them to every host, or give "
            f"{field}=null"
        )


def _checks(where: str | None, ranks: Ranks) -> bool:
    """Whether this rank looks for the shards: one on each host in a folder, which may be the host's own."""
    return (ranks.rank if where and is_url(where) else ranks.local_rank) == 0
