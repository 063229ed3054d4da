"""What a fine-tuning says of itself: model, objective and images."""

from __future__ import annotations

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.engine.task import Described
from beit_dist.images.labelled.images import LabelledImages
from beit_dist.images.labelled.label_maps import LabelMaps

_NAMED = 5


def model_rows(config: FinetuningConfig) -> Described:
    """Sizes, input and objective."""
    model = config.model
    positions = "absolute" if model.absolute_positions else "no absolute"
    bias = "a relative bias in each block" if model.block_positions else "a shared relative bias"
    bias = bias if model.relative_positions else "no relative bias"
    scale = f"LayerScale {model.layer_scale:g}" if model.layer_scale else "no LayerScale"
    yield (
        "model",
        f"{model.depth} blocks of width {model.width}, {model.heads} heads; {positions} positions, {bias}, "
        f"{scale}, drop path {model.drop_path:g}",
    )
    yield "input", f"{model.image_size} px in {model.grid}×{model.grid} patches of {model.patch_size} px"
    yield "first weights", config.init_from or "random: init_from names no pre-trained model"
    yield "layer decay", f"{config.layer_decay:g}: the first layer learns at {_least(config):.2g} of the rate"


def data_rows(
    config: FinetuningConfig,
    training: LabelledImages | LabelMaps,
    held_out: LabelledImages | LabelMaps | None,
    steps: int,
) -> Described:
    """The images and their classes.

    Args:
        steps: of the whole run.
    """
    names = ", ".join(training.classes[:_NAMED])
    more = len(training.classes) - _NAMED
    listed = f"{len(training.classes):,} classes ({names}" + (f" and {more:,} more)" if more > 0 else ")")
    yield "data", f"{source(config.data)}: {len(training):,} images of {listed}"
    if held_out is None:
        yield "held out", "nothing, so what the model learns is not measured (validation.data=null)"
        return
    count = min(config.validation.samples, len(held_out))
    some = f"{count:,} of {len(held_out):,}" if count < len(held_out) else f"{count:,}"
    every = config.measured_every(steps)
    end = ", all at the end" if count < len(held_out) else ""
    yield "held out", f"{source(config.validation.data)}: {some} images, every {every:,} steps{end}"
    known = set(map(str, training.files))
    if both := [name for name in map(str, held_out.files) if name in known]:
        yield "note", f"{len(both):,} held-out images are trained on, too, and are no measure of it: {both[0]}"


def _least(config: FinetuningConfig) -> float:
    return float(config.layer_decay ** (config.model.depth + 1))


def source(named: str | tuple[str, ...] | None) -> str:
    """What a user named, as text."""
    return named if isinstance(named, str) else " ".join(named or ())
