"""Training of a dVAE as a task: images in random crops, the evidence lower bound, and a file at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.precision import LOW, decide, decide_alone, settle, settle_alone
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.resume import compare_recipes
from beit_dist.engine.run_folder import DONE, RunFolder
from beit_dist.engine.task import Described, Fetched, Needs, Running, Step, Sums, Surroundings, Task
from beit_dist.errors import ConfigError, TokenizerError
from beit_dist.images.crops import CropBatches
from beit_dist.models import dissected
from beit_dist.models.dvae import DVAE, STRIDE
from beit_dist.models.dvae_objective import cosine, elbo
from beit_dist.step_numbers import KnownBaselines
from beit_dist.tasks.tokenizer import describing
from beit_dist.tasks.tokenizer.codebook import Codebook
from beit_dist.tasks.tokenizer.first_weights import clustered_weights, random_model
from beit_dist.tasks.tokenizer.judging import Judging
from beit_dist.tasks.tokenizer.noise import noise_of_rows
from beit_dist.tasks.tokenizer.numbers import KNOWN, MEASURED, METRICS, NUMBERS
from beit_dist.tasks.tokenizer.output import Output
from beit_dist.tasks.tokenizer.pictures import Pictures
from beit_dist.tasks.tokenizer.quality import Quality, measure
from beit_dist.tasks.tokenizer.usage import Usage
from beit_dist.weights.foreign import Foreign
from beit_dist.weights.tokenizer_files import load_tokenizer, tokenizer_digest, tokenizer_extra


class MicroBatch(NamedTuple):
    """Crops on the device."""

    images: Tensor
    """uint8 ``(B, 3, side, side)``."""
    rows: range
    """Of the global batch."""
    whole_usage: Callable[[Tensor], Tensor]
    """From the micro-batch's average token distribution to that of the global batch."""


class TokenizerTraining(Task[TokenizerConfig, Tensor, MicroBatch]):
    """Training of a dVAE (DALL-E paper, arXiv 2102.12092, section 2.1 and appendix A.2).

    Args:
        config: the recipe.
        out: the file to write at the end.
        built_in: DeepSpeed's settings are the built-in ones: weights are fp32, and ``precision`` is of the
            convolutions.
        sniff: look into files at URLs whose names do not tell what they are.
    """

    kind = "tokenizer"
    frozen = (
        *("model", "start", "seed", "global_batch", "optimizer.name"),
        *("view_size", "image_size", "crop_scale", "held_out"),
    )
    shown = (
        *("steps", "optimizer", "encoder_lr_share", "ema", "temperature", "temperature_steps"),
        *("kl_weight", "kl_warmup_steps", "usage_weight"),
    )
    numbers, known, measured, metrics = NUMBERS, KNOWN, MEASURED, METRICS

    def __init__(self, config: TokenizerConfig, out: Path, *, built_in: bool = True, sniff: bool = False) -> None:
        super().__init__(config)
        self.output = Output(out)
        self.pictures = Pictures(config, sniff)
        self._judging = Judging(config, self.pictures)
        self._built_in = built_in
        self._precision = ""
        self.quality: Quality | None = None  # of what was measured last
        self._batches: CropBatches | None = None
        self._from_clusters = False

    # ------------------------------------------------------------------------------------- before the ranks join

    def check(self, ranks: Ranks) -> None:
        """Find the images, and see that the file can be written."""
        if ranks.rank == 0:
            self.output.check()
        self.pictures.find(loud=ranks.rank == 0)
        self.epoch_samples = self.pictures.found - self.pictures.kept_aside

    def network(self) -> DVAE:
        """Encoder and decoder."""
        return DVAE(self.config.model)

    def describe_model(self, resolved: Resolved) -> Described:
        """Sizes and objective."""
        return describing.model_rows(self.config, self.output.file)

    def describe_data(self, resolved: Resolved) -> Described:
        """The images; none is read."""
        self.check(Ranks())
        yield describing.data_row(self.config, self.pictures.found, self.pictures.kept_aside)

    def introduce(self, steps: int) -> Described:
        """The network and the images."""
        return describing.introduction_rows(
            self.config, self.output.file, self.epoch_samples, len(self.pictures.held_out), steps
        )

    def next_commands(self) -> Sequence[str]:
        """Look at the picture, then write shards."""
        return describing.next_commands(self.config, self.output, self.epoch_samples)

    @property
    def multiply_adds(self) -> int:
        """Of encoder and decoder on one crop."""
        with torch.device("meta"):
            return dissected.multiply_adds(self.network(), *self._sample_inputs())

    @property
    def copies(self) -> int:
        """The weights that are measured."""
        return 1

    def activation_bytes(self, resolved: Resolved) -> int:
        """What autograd keeps for one crop, times the micro-batch."""
        with torch.device("meta"):
            kept = dissected.saved_bytes(self.network(), *self._sample_inputs())
        precision = self._precision if self._built_in else resolved.precision
        return resolved.micro_batch * (kept if precision == "fp32" else kept // 2)

    def settle_alone(self, resolved: Resolved, saved: Mapping[str, Any] | None) -> Resolved:
        """See :meth:`settle`."""
        was = saved["convolutions"] if saved else None
        if not self._built_in:
            resolved = settle_alone(resolved, was)
            self._precision = resolved.precision
            return resolved
        taken = decide_alone(self.config.precision, "from the recipe", was, excluded=("fp16",))
        self._precision = taken.precision
        return resolved.settled(resolved.precision, f"the weights; the convolutions: {taken}")

    # ---------------------------------------------------------------------------------------- the ranks have met

    def finished(self, run: RunFolder) -> str | None:
        """The file is written, with as many steps as are asked for.

        Raises:
            CheckpointError: it is, but what is asked for is another tokenizer.
        """
        try:
            said = json.loads(run.place.read(DONE))
            if said["kind"] != self.kind:
                return None  # of an older version, or of another training: the start names it
            if said["step"] < self.config.steps or tokenizer_digest(self.output.file) != said["digest"]:
                return None
            digest, old = str(said["digest"]), tokenizer_extra(self.output.file)["recipe"]
        except (FileNotFoundError, ValueError, KeyError, TokenizerError):
            return None
        compare_recipes(
            self.config,
            {"run": self.config.run, **old},
            loud=True,
            frozen=self.frozen,
            shown=self.shown,
            said="not applied, as it is done",
        )
        return f"{self.output.file} (digest {digest[:16]})"

    def settle(
        self, resolved: Resolved, saved: Mapping[str, Any] | None, agreement: Agreement, device: torch.device
    ) -> Resolved:
        """Without a JSON, of the convolutions alone: the engine's precision stays fp32."""
        was = saved["convolutions"] if saved else None
        if not self._built_in:
            resolved = settle(resolved, was, agreement, device)
            self._precision = resolved.precision
            return resolved
        taken = decide(self.config.precision, "from the recipe", was, agreement, device, excluded=("fp16",))
        self._precision = taken.precision
        return resolved.settled(resolved.precision, f"the weights; the convolutions: {taken}")

    def prepare(self, around: Surroundings, saved: Mapping[str, Any] | None) -> None:
        """Read the images, and see that all ranks have the same, and those of the run."""
        self._around = around
        self.pictures.read(around, saved)
        self.epoch_samples = len(self.pictures.trained_on)

    def take_up(self, saved: Mapping[str, Any] | None) -> None:
        """The codebook's recent use."""
        self.codebook = Codebook(self.config, saved["position"]["codebook"] if saved else None)
        self._from_clusters = saved is None and self.config.start == "clusters" and self.config.init_from is None

    def needs(self, resolved: Resolved) -> Needs:
        """Nothing besides: the images are in memory already."""
        return Needs()

    def model(self) -> nn.Module:
        """The network, initialised from the seed; by rank 0 from clusters of patches if the recipe says so."""
        model = random_model(self.config)
        if self._from_clusters:
            first = clustered_weights(self.config, self.pictures) if self._around.ranks.rank == 0 else None
            model.load_state_dict(self._around.agreement.from_rank_0(first), strict=False)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Convolutions' weights are decayed, biases are not; the encoder may have a smaller learning rate."""
        config = self.config
        shares = {"encoder": config.encoder_lr_share, "decoder": 1.0}
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            part, decayed = name.partition(".")[0], name.endswith(".w")
            group = groups.setdefault(
                f"{part}, {'decay' if decayed else 'no_decay'}",
                {
                    "params": [],
                    "weight_decay": config.optimizer.weight_decay if decayed else 0.0,
                    "lr_share": shares[part],
                },
            )
            group["params"].append((name, parameter))
        return [{"name": name, **group} for name, group in groups.items()]

    def foreign(self, source: str) -> Foreign:
        """A tokenizer's file."""
        model = load_tokenizer(source)
        if model.config != self.config.model:
            raise ConfigError("init_from", source, f"a tokenizer of the sizes of this recipe, {self.config.model}")
        return Foreign({name: tensor.float() for name, tensor in model.state_dict().items()}, model.digest)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The images, and what the convolutions are computed in."""
        pictures = self.pictures
        return {"images": pictures.digest, "kept_aside": pictures.kept_aside, "convolutions": self._precision}

    def open(self, running: Running) -> None:
        """Begin to crop images."""
        config, around = self.config, self._around
        self._running = running
        self._low = LOW.get(self._precision)
        self._noise = torch.Generator(around.device)
        self._usage = Usage(around.ranks.world, bool(config.usage_weight), running.others_wait)
        self._measured_model = DVAE(config.model).requires_grad_(False).eval().to(around.device)
        self._batches = self.pictures.batches(
            config.global_batch, config.workers, around.rows, running.progress.step
        )

    def begun(self, metrics: Metrics) -> None:
        """The vocabulary."""
        metrics.set({"beit_tokenizer_vocabulary": self.config.model.vocabulary})

    # ------------------------------------------------------------------------------------------------- the steps

    def fetch(self, following: bool) -> Fetched:
        """The next crops."""
        assert self._batches is not None
        stop = self._around.stop
        crops = self._batches.next_unless(lambda: stop.known)
        if crops is None:
            return Fetched(None, [])
        return Fetched(
            torch.from_numpy(crops.pixels), [], crops.wait_seconds, torch.tensor(crops.images, dtype=torch.int64)
        )

    def begin(self, batch: Tensor, summed: Sequence[int]) -> Step:
        """The weight is the number of images; temperature and KL weight follow from the step."""
        config, step = self.config, self._running.progress.step
        return Step(
            config.global_batch,
            {
                "temperature": cosine(*config.temperature, step, config.temperature_fall),
                "kl_weight": cosine(0, config.kl_weight, step, config.kl_rise),
            },
        )

    def rows(self, batch: Tensor) -> Iterator[MicroBatch]:
        """The crops of a micro-batch, and how it learns of the others' tokens."""
        size, own = self._around.resolved.micro_batch, self._around.rows
        parts = [
            (batch[low : low + size].to(self._around.device, non_blocking=True), own[low : low + size])
            for low in range(0, len(batch), size)
        ]
        encode = partial(self._running.engine.module, low=self._low)
        whole_usage = self._usage.of_batch([images for images, _ in parts], encode)
        for images, rows in parts:
            yield MicroBatch(images, rows, whole_usage)

    def forward(self, rows: MicroBatch, step: Step) -> Sums:
        """The evidence lower bound.

        Every term but one is a mean over the images, so the sum over them is their number times it. The other,
        the usage term, is given the batch's average token distribution: see :func:`elbo`.
        """
        terms = elbo(
            partial(self._running.engine, low=self._low),
            rows.images,
            self._noise_of(rows.rows),
            step.known["temperature"],
            step.known["kl_weight"],
            self.config.usage_weight,
            rows.whole_usage,
        )
        loss = terms.loss * len(rows.rows)
        parts = (terms.negative_log_likelihood, terms.kl, terms.usage_kl)
        return Sums(loss, [loss, *(part * len(rows.rows) for part in parts)], terms.token_counts)

    def name_of(self, sample: int) -> int | str:
        """The image's."""
        return self.pictures.pool.name_of(sample)

    def average_limit(self, step: int) -> float:
        """A young average follows quickly, or it would still hold the random start when a short run ends."""
        return step / (9 + step)

    def tallied(self, step: int, tally: Any) -> Mapping[str, Any]:
        """The codebook's use."""
        self.codebook.take(step, tally)
        return {"perplexity": round(self.codebook.perplexity, 3), "dead": self.codebook.dead}

    @property
    def alarm(self) -> str | None:
        """The codebook has collapsed."""
        return self.codebook.alarm

    @property
    def blame(self) -> str:
        """See :attr:`Task.blame`."""
        return (
            f"Lower optimizer.lr ({self.config.optimizer.lr:g}), or compute in fp32 (precision, or bf16 and fp16 "
            "of --ds_config)."
        )

    def baselines(self) -> KnownBaselines:
        """Of the PSNR, once the images were read."""
        return self._judging.baselines()

    def evaluate(self, step: int) -> Mapping[str, Any] | None:
        """Measure the averaged weights on held-out images, and draw a picture."""
        quality = self._measure()
        if quality is None:
            return None
        if self._around.ranks.rank == 0:
            drawn = self._judging.picture(self._measured_model, quality, step)
            (self._running.run.place / "pictures").write(f"step-{step:08d}.png", drawn)
        return quality.facts()

    def position(self) -> Mapping[str, Any]:
        """The codebook's recent use; images, crops, noise and schedules follow from the step alone."""
        return {"codebook": self.codebook.state}

    def conclude(self) -> Mapping[str, Any]:
        """Write file and picture of the measured weights, and say how good they are."""
        if self.quality is None:  # measured by an earlier start
            self._measure(whole=True)
        quality, progress = self.quality, self._running.progress
        if self._around.ranks.rank != 0 or quality is None:
            return {}
        about = {
            "recipe": self.config.model_dump(mode="json", exclude=set(self.config.of_the_host)),
            "arithmetic": self._precision,
            "images": len(self.pictures.pool),
            "ranks": self._around.ranks.world,
            "steps": progress.step,
            "skipped": progress.counters["skipped"],
            "quality": quality.facts(),
        }
        text, said = self._judging.verdict(quality)
        drawn = self._judging.picture(self._measured_model, quality, progress.step)
        digest = self.output.write(self._measured_model, about | said, drawn)
        if skipped := progress.counters["skipped"]:
            print(f"warning: {skipped} steps were skipped, as their gradients were not finite", file=sys.stderr)
        print(text, flush=True)
        return {"digest": digest, **quality.facts(), **said}

    def close(self) -> None:
        """Stop cropping."""
        if self._batches is not None:
            self._batches.close()

    # ------------------------------------------------------------------------------------------------- of its own

    def _measure(self, whole: bool = False) -> Quality | None:
        """How good the averaged weights are. Collective; None when a rank was asked to stop.

        ``whole``: stop requests wait.
        """
        self._measured_model.load_state_dict(self._running.weights())
        found = measure(self._measured_model, self.pictures.held_out, self._around, whole=whole)
        self.quality = found or self.quality
        return found

    def _sample_inputs(self) -> tuple[Tensor, Tensor]:
        """One crop and its noise on the meta device, for a look at what a forward pass takes."""
        side = self.config.image_size
        tokens = (1, self.config.model.vocabulary, side // STRIDE, side // STRIDE)
        return torch.empty(1, 3, side, side), torch.empty(tokens)

    def _noise_of(self, rows: range) -> Tensor:
        config = self.config
        side = config.image_size // STRIDE
        shape = (config.model.vocabulary, side, side)
        return noise_of_rows(config.seed, self._running.progress.step, rows, shape, self._noise)
