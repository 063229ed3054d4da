"""What a tokenizer's training says of itself: the network, the images, and what to do with the result."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.durations import counted
from beit_dist.engine.task import Described
from beit_dist.models.dvae import STRIDE
from beit_dist.tasks.tokenizer.output import Output

_MANY = 20_000
"""Images up to which the recipe for small data, of 40 epochs, is proposed; more need no more than one view."""
_SHARDS = 112
"""Side of what ``beit shards`` tokenizes by default: 8 px for each of 14×14 patches."""


def model_rows(config: TokenizerConfig, out: Path) -> Described:
    """Sizes and objective, for ``--dry-run``."""
    yield from _network_rows(config, out)
    hot, cold = config.temperature
    yield (
        "objective",
        f"KL weight {config.kl_weight:g}, reached after {config.kl_rise:,} steps; usage weight "
        f"{config.usage_weight:g}; temperature from {hot:g} to {cold:g} over {config.temperature_fall:,} steps",
    )


def data_row(config: TokenizerConfig, found: int, kept_aside: int) -> tuple[str, str]:
    """The images, before any is read."""
    return "data", f"{', '.join(_sources(config))}: {found:,} images, {kept_aside} of them held out"


def introduction_rows(config: TokenizerConfig, out: Path, trained_on: int, held_out: int, steps: int) -> Described:
    """The network and the images, once they were read."""
    yield from _network_rows(config, out)
    yield "data", f"{', '.join(_sources(config))}: {trained_on:,} images"
    yield "held out", f"{held_out:,} images, measured every {config.measured_every(steps):,} steps"


def next_commands(config: TokenizerConfig, output: Output, images: int) -> Sequence[str]:
    """Look at the picture, then write shards; of few images several views, so that an epoch differs from the next.

    Args:
        images: that are trained on.
    """
    sources, size = " ".join(map(shlex.quote, _sources(config))), config.view_size
    views = "" if images > _MANY else " --views 8"
    sizes = "" if size == _SHARDS else f" --image-size {size} --patch-size 8"
    return (
        f"look at {output.picture}",
        f"beit shards --images {sources} --tokenizer {shlex.quote(str(output.file))} --out shards{views}{sizes} "
        "--held-out 5%",
    )


def _network_rows(config: TokenizerConfig, out: Path) -> Described:
    model, side = config.model, config.image_size // STRIDE
    yield "out", f"{out}"
    yield (
        "model",
        f"dVAE of {model.vocabulary:,} tokens; 4 groups of {counted(model.blocks_per_group, 'block')}, width "
        f"{model.hidden} to {8 * model.hidden}; the decoder begins with {model.decoder_input} channels",
    )
    yield "input", f"crops of {config.image_size} px from views of {config.view_size} px: {side}×{side} tokens"


def _sources(config: TokenizerConfig) -> tuple[str, ...]:
    data = config.data
    return (data,) if isinstance(data, str) else tuple(data or ())
