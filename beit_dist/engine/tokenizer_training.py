"""Trains the dVAE: the loop, the averaged weights, and the measurements that tell whether it is any good.

One process, on the CPU or one GPU. The same images, recipe, thread count and versions give the same file.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from beit_dist.config import TokenizerRecipe
from beit_dist.data.crops import CropBatches, ImagePool, centred_view, find_images
from beit_dist.data.draws import Purpose, permutation, words
from beit_dist.errors import ConfigError, UserError
from beit_dist.visual_tokens.dvae import DVAE
from beit_dist.visual_tokens.objective import ElboTerms, cosine, elbo, gumbel_noise, perplexity, psnr
from beit_dist.visual_tokens.weights import check_writable, save_tokenizer

MOST_SKIPPED = 20
"""Steps in a row with a gradient that is not finite before the training gives up."""
COLLAPSED = 0.02
"""Perplexity below this share of the vocabulary is reported as a collapsed codebook."""

_SHOWN = 8
"""Columns of the picture of reconstructions."""
_MEASURED_AT_ONCE = 32
_RECENT = 0.95
"""How much of the running codebook statistics a step keeps."""


@dataclass(frozen=True)
class Quality:
    """A tokenizer measured on held-out images."""

    psnr: float
    """dB, of reconstructions from hard tokens."""
    perplexity: float
    """exp of the entropy of the tokens' frequencies."""
    used: int
    """Tokens that occur at all."""
    vocabulary: int

    @property
    def collapsed(self) -> bool:
        return self.perplexity < max(2.0, COLLAPSED * self.vocabulary)


@dataclass(frozen=True)
class Trained:
    """What a training produced."""

    path: Path
    picture: Path
    digest: str
    quality: Quality
    skipped: int
    """Steps without an update, because the gradient was not finite."""


def train_tokenizer(images: str, out: str | Path, recipe: TokenizerRecipe, device: str = "auto") -> Trained:
    """Train a dVAE on ``images`` and write it to ``out``, with a picture of reconstructions beside it.

    Args:
        images: a folder of images, a tar, or a webdataset specification of tars.
        device: ``auto`` takes the GPU if there is one.

    Raises:
        UserError: images, recipe, device or output cannot be used; found before the first step.
    """
    out = Path(out)
    check_writable(out)
    place = choose_device(device)
    files = find_images(images)
    needed = math.ceil(recipe.view_size / recipe.crop_scale[0])
    least = recipe.held_out + 1
    pool = ImagePool(files, needed, int(recipe.cache_gib * 2**30), recipe.workers, least)
    if pool.rejected:
        notice(f"{len(pool.rejected)} images left out, first {pool.rejected[0]}")
    order = permutation(recipe.seed, Purpose.SOURCE_ORDER, (), len(pool)).tolist()
    views = np.stack([centred_view(pool[number], recipe.view_size) for number in order[: recipe.held_out]])
    held_out = torch.from_numpy(views.transpose(0, 3, 1, 2).copy())
    batches = CropBatches(
        pool,
        order[recipe.held_out :],
        batch=recipe.batch,
        side=recipe.image_size,
        scale=recipe.crop_scale,
        share=recipe.image_size / recipe.view_size,
        seed=recipe.seed,
        workers=recipe.workers,
    )
    training = Training(recipe, place)
    with contextlib.closing(batches):
        _run(training, batches)
    model = training.averaged.cpu()
    quality, shown = measure(model, held_out)
    about = {
        "recipe": recipe.model_dump(mode="json"),
        "precision": training.precision,
        "images": len(pool),
        "quality": asdict(quality),
    }
    picture = out.with_suffix(".png")
    _write_picture(picture, held_out, shown)
    digest = save_tokenizer(out, model, recipe.model, about)
    return Trained(out, picture, digest, quality, training.skipped)


class Training:
    """A model, its optimizer and its average: everything a step changes."""

    def __init__(self, recipe: TokenizerRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.precision = choose_precision(recipe.precision, device)
        self.model = _channels_last(DVAE(recipe.model, seed=_short(recipe.seed, 0)).to(device))
        self.averaged = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.step_number = self.skipped = self._skipped_in_a_row = 0
        self._noise = torch.Generator(device).manual_seed(_short(recipe.seed, 1))
        named = list(self.model.named_parameters())
        self._parameters: list[Tensor] = [p for _, p in named]
        self._averages: list[Tensor] = list(self.averaged.parameters())
        groups = [
            {"params": [p for n, p in named if n.endswith(".w")], "weight_decay": recipe.weight_decay},
            {"params": [p for n, p in named if not n.endswith(".w")], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=1e-8)

    @property
    def temperature(self) -> float:
        recipe = self.recipe
        start, end = recipe.temperature
        return cosine(start, end, self.step_number, recipe.temperature_steps or max(1, recipe.steps * 3 // 4))

    @property
    def kl_weight(self) -> float:
        recipe = self.recipe
        return cosine(0, recipe.kl_weight, self.step_number, recipe.kl_warmup_steps or max(1, recipe.steps // 4))

    @property
    def lr(self) -> float:
        recipe = self.recipe
        rise = min(1.0, (self.step_number + 1) / (recipe.warmup_steps + 1))
        return rise * cosine(recipe.lr, recipe.min_lr, self.step_number, recipe.steps)

    def step(self, images: Tensor) -> ElboTerms:
        """One update on uint8 images ``(B, 3, H, W)``; none if the gradient is not finite.

        Raises:
            UserError: ``MOST_SKIPPED`` gradients in a row were not finite.
        """
        images = images.to(self.device, non_blocking=True)
        grid = (images.shape[0], self.recipe.model.vocabulary, images.shape[2] // 8, images.shape[3] // 8)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            noise = gumbel_noise(grid, self._noise)
            terms = elbo(self.model, images, noise, self.temperature, self.kl_weight, self.recipe.usage_weight)
        self._optimizer.zero_grad()
        terms.loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.recipe.clip_grad or math.inf)
        if math.isfinite(float(norm)):
            self._skipped_in_a_row = 0
            for group in self._optimizer.param_groups:
                group["lr"] = self.lr
            self._optimizer.step()
            self._average()
        else:
            self._skip()
        self.step_number += 1
        return terms._replace(loss=terms.loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        # A young average follows quickly, or it would still hold the random start when a short run ends.
        decay = min(self.recipe.ema, (1 + self.step_number) / (10 + self.step_number))
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)

    def _skip(self) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"{MOST_SKIPPED} steps in a row without a finite gradient, at step {self.step_number}. "
                f"Lower lr ({self.recipe.lr}), or set precision=fp32."
            )


def choose_device(device: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device that is there.

    Raises:
        ConfigError: no such device.
    """
    present = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if present else "cpu")
    if device not in ("cpu", "cuda"):
        raise ConfigError("--device", device, "auto, cpu or cuda")
    if device == "cuda" and not present:
        raise ConfigError("--device", device, "cpu or auto: PyTorch finds no GPU here")
    return torch.device(device)


def choose_precision(
    asked: Literal["auto", "fp32", "bf16"], device: torch.device, processor: Path = Path("/proc/cpuinfo")
) -> Literal["fp32", "bf16"]:
    """``auto`` as what is fast on ``device``.

    A CPU without AMX has no matrix unit for bf16. Steps of ``tokenizer_demo.yaml`` on one core of an AMD EPYC
    (Zen 5): fp32 60 ms; bf16 56 ms with AVX-512's bf16 instructions, 87 ms with AVX-512 alone, 380 ms with AVX2.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16"
    return "bf16" if processor.exists() and "amx_bf16" in processor.read_text().split() else "fp32"


def measure(model: DVAE, images: Tensor) -> tuple[Quality, Tensor]:
    """Quality on uint8 images ``(N, 3, H, W)``, and the first few of their reconstructions, uint8."""
    counts = torch.zeros(model.config.vocabulary, dtype=torch.int64)
    reconstructed = []
    for some in torch.split(images, _MEASURED_AT_ONCE):
        tokens = model.tokens(some)
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
        reconstructed.append((model.decode(tokens) * 255).round().to(torch.uint8))
    result = torch.cat(reconstructed)
    quality = Quality(psnr(result / 255, images / 255), perplexity(counts), int((counts > 0).sum()), len(counts))
    return quality, result[:_SHOWN]


def notice(text: str) -> None:
    """A line to the user that no progress bar overwrites."""
    tqdm.write(text, file=sys.stderr)


def _run(training: Training, batches: Iterator[np.ndarray]) -> None:
    recipe = training.recipe
    counts = torch.zeros(recipe.model.vocabulary, device=training.device)
    start = time.monotonic()
    report_every = max(1, recipe.steps // 20)
    with tqdm(total=recipe.steps, desc="training", unit="step", disable=None) as bar:
        for step in range(1, recipe.steps + 1):
            terms = training.step(torch.from_numpy(next(batches)))
            counts.mul_(_RECENT).add_(terms.token_counts)
            bar.update()
            if step % (report_every if bar.disable else 10) and step not in (1, recipe.steps):
                continue
            elapsed = time.monotonic() - start
            numbers = (
                f"loss {float(terms.loss):.3f}, KL {float(terms.kl):.2f} nats, perplexity "
                f"{perplexity(counts):.0f}/{recipe.model.vocabulary}, {step * recipe.batch / elapsed:.0f} images/s"
            )
            if bar.disable:  # a log file: a line now and then in place of the bar
                left = elapsed / step * (recipe.steps - step)
                notice(f"step {step}/{recipe.steps}: {numbers}, {left:.0f} s left")
            else:
                bar.set_postfix_str(numbers)


def _write_picture(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """Originals above their reconstructions from hard tokens."""
    columns = len(reconstructions)
    rows = torch.stack([originals[:columns], reconstructions])  # (2, n, 3, H, W)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(sheet.numpy()).save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _channels_last(model: DVAE) -> DVAE:
    """Weights in the layout that convolutions are fastest in, on the CPU and on GPUs."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _short(seed: int, use: int) -> int:
    """A seed for a torch generator, independent for each use."""
    return int(words(seed, Purpose.TOKENIZER_NOISE, (use,), 1)[0] >> np.uint64(1))
