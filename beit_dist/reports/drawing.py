"""The pictures of a run, or of several, from their folders: what is drawn, and of which images."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from beit_dist.checkpoints.layout import MANIFEST, committed
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import recorded
from beit_dist.config.run import RunConfig
from beit_dist.errors import ConfigError, DataError, printable
from beit_dist.inference.painting import Reconstruction, pixel_painter, token_painter
from beit_dist.inference.tokenizers import find_tokenizer
from beit_dist.models.heads.pixels import PixelsHead
from beit_dist.models.heads.tokens import TokensHead
from beit_dist.models.mim import MaskedImageModel
from beit_dist.reports.curves import Curves, draw_curves
from beit_dist.reports.history import read_history
from beit_dist.reports.panels import check_fit, draw_panel, reconstruct
from beit_dist.reports.samples import read_spread
from beit_dist.reports.sources import Images, open_images, read_recipe
from beit_dist.step_numbers import KnownBaselines, Number
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place
from beit_dist.stream.masking.modes import masks_of
from beit_dist.weights.stored import open_weights

ConfigT = TypeVar("ConfigT", bound=RunConfig)

CURVES, PANEL = "loss.png", "panel.png"
"""Names of the pictures."""


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of training without its task."""

    schema: type[RunConfig]
    numbers: Callable[[Any], Sequence[Number]]
    """Of its steps, by its recipe; the first is the loss."""
    measured: Callable[[Any], Sequence[Number]]
    """What is measured on held-out data."""
    title: Callable[[Any], str]
    baselines: Callable[[Any], KnownBaselines] | None = None
    """From its recipe; by default those that the run itself noted."""


@dataclass(frozen=True)
class Wishes:
    """What the user may choose for the panel."""

    data: str | None = None
    """Where its images come from."""
    tokenizer: str | None = None
    samples: int = 6
    ema: bool = False
    """Predict with the averaged weights."""
    device: str | torch.device = "cpu"


def draw_run(
    where: str, kinds: Mapping[str, Kind], wishes: Wishes, out: Path | None, access: Access
) -> Iterator[str]:
    """Draw a run's curves, and if it is a pre-training, a panel; yields what to tell the user, step by step.

    Args:
        where: run folder or one of its step folders, or its URL.
        out: folder to write to; by default ``pictures`` in the run folder.

    Raises:
        UserError: something is missing or damaged, or does not belong together.
    """
    named = open_place(where, access)
    run = run_of(named)
    if out is None and not run.is_local:
        raise ConfigError("--out", None, "a folder to write to, as the run is at a URL")
    out = out or run.path / "pictures"
    kind, config, curves = _read(run, kinds, run.name, access)
    draw_curves([curves], out / CURVES, f"{curves.name}: {kind.title(config)}")
    yield f"wrote {out / CURVES}"
    if not isinstance(config, PretrainingConfig):
        return
    if not committed(run / "checkpoints"):
        yield f"no {PANEL} yet: the run has no checkpoint"
        return
    yield _draw_panel(named, curves, wishes, out / PANEL, access)


def compare_runs(wheres: Sequence[str], kinds: Mapping[str, Kind], out: Path | None, access: Access) -> str:
    """Draw the curves of several runs of a kind over each other; returns what to tell the user.

    Raises:
        ConfigError: they are of several kinds, or it is not said where to write.
        DataError: one is no run.
    """
    if out is None:
        raise ConfigError("--out", None, "a folder to write to, as several runs are drawn")
    runs = [run_of(open_place(where, access)) for where in wheres]
    read = [_read(run, kinds, name, access) for run, name in zip(runs, names_of(wheres), strict=True)]
    numbers = {curves.name: tuple(number.name for number in curves.numbers) for _, _, curves in read}
    if len(set(numbers.values())) > 1:
        said = "; ".join(f"{printable(name)}: {', '.join(own)}" for name, own in numbers.items())
        raise ConfigError("RUN", said, "runs that have the same numbers", "Draw each by itself.")
    draw_curves([curves for _, _, curves in read], out / CURVES)
    return f"wrote {out / CURVES}"


def names_of(wheres: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [os.path.normpath(where).split("/") for where in wheres]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(wheres)


def run_of(place: Place) -> Place:
    """The run folder, where one of its step folders is named."""
    return place.parent.parent if place.exists(MANIFEST) else place


def _read(run: Place, kinds: Mapping[str, Kind], name: str, access: Access) -> tuple[Kind, RunConfig, Curves]:
    found, recipe = read_recipe(run)
    if found not in kinds:
        raise DataError(f"{run}: got a {found} run, expected one of these kinds: {', '.join(kinds)}")
    kind = kinds[found]
    config = reaching(recorded(kind.schema, recipe), access)
    baselines = kind.baselines(config) if kind.baselines else noted_baselines(run)
    return kind, config, Curves(name, read_history(run), kind.numbers(config), kind.measured(config), baselines)


def noted_baselines(run: Place) -> KnownBaselines:
    try:
        return KnownBaselines.of_plain(json.loads(run.read("run.json"))["baselines"])
    except (FileNotFoundError, ValueError, KeyError):  # of an older version
        return KnownBaselines()


def reaching(config: ConfigT, access: Access) -> ConfigT:
    """The recipe, whose data is reached as the run is: its options for stores may hold on another host only."""
    options = {**config.storage.options, **access.options}
    return config.model_copy(update={"storage": config.storage.model_copy(update={"options": options})})


@dataclass(frozen=True)
class Panel:
    """Images with what a model paints into their masked patches."""

    columns: list[Reconstruction]
    images: Images
    title: str


def panel_of(named: Place, baselines: KnownBaselines, wishes: Wishes, access: Access) -> Panel | str:
    """Have a pre-trained model paint masked patches; or, in words, why it cannot be drawn.

    Args:
        named: run folder or step folder.
        baselines: of the run.
        wishes: which images, and how many.
        access: how URLs are reached.

    Raises:
        UserError: something is missing or damaged, or does not belong together.
    """
    stored = open_weights(str(named), ema=wishes.ema, access=access)
    config, facts = reaching(stored.config, access), stored.saved.manifest
    images = open_images(wishes.data, config, facts["dataset"])
    model = MaskedImageModel(config.model)
    check_fit(model, images.manifest)
    head = model.head
    if isinstance(head, PixelsHead):
        paint = pixel_painter(head)
    elif isinstance(head, TokensHead):
        dvae = find_tokenizer(wishes.tokenizer, config, images.manifest.tokenizer, torch.device(wishes.device))
        if dvae is None:
            return "it needs the tokenizer that made the shards. Name its file with --tokenizer FILE"
        paint = token_painter(dvae, _guessing(baselines, images))
    else:
        return f"with model.target={config.model.target} the model predicts nothing that can be drawn"
    model.load_state_dict({name: stored.read(name) for name in stored.shapes})
    samples = read_spread(images.place, images.manifest, wishes.samples)
    masks = masks_of(config.masking, config.model.grid, config.seed)
    columns = reconstruct(model.to(wishes.device), samples, masks, paint)
    averaged = ", averaged weights" if wishes.ema else ""
    title = f"Masked patches painted from predicted {config.model.target}: {images.are}, step {facts['step']:,}"
    return Panel(columns, images, title + averaged)


def _draw_panel(named: Place, curves: Curves, wishes: Wishes, out: Path, access: Access) -> str:
    found = panel_of(named, curves.baselines, wishes, access)
    if isinstance(found, str):
        return f"no {PANEL}: {found}"
    draw_panel(found.columns, out, found.title)
    return f"wrote {out}: {found.images.are}"


def _guessing(baselines: KnownBaselines, images: Images) -> float:
    """The share of tokens that is right without looking at the images."""
    training, held_out = (known.get("accuracy") for known in baselines[:2])
    known = held_out if images.measured_on and held_out else training
    return max((baseline.value for baseline in known or ()), default=math.nan)
