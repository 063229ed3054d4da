"""What a pre-trained model paints into masked patches of held-out images."""

from __future__ import annotations

from dataclasses import dataclass

from beit_dist.inference.painting import Reconstruction
from beit_dist.reports.drawing import Wishes, panel_of
from beit_dist.reports.html.embedded import data_uri, enlarged, outlined
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject
from beit_dist.storage.access import Access


@dataclass(frozen=True)
class Shown:
    """One image, and its pictures."""

    name: str
    pictures: tuple[tuple[str, str], ...]
    """What each is, and its data URI."""
    said: str


@dataclass(frozen=True)
class Reconstructions:
    """Of a run."""

    title: str
    images: tuple[Shown, ...]


def reconstructions_of(run: Subject, wishes: Wishes, access: Access) -> Reconstructions | Missing:
    """Have the model paint, with the run's masks.

    Raises:
        UserError: the data is gone or damaged, or there is no whole checkpoint.
    """
    if not run.has_checkpoint:
        return Missing("The run has no checkpoint yet. Make the report again when it has saved one.")
    found = panel_of(run.named, run.baselines, wishes, access)
    if isinstance(found, str):
        return Missing(found[0].upper() + found[1:] + ".")
    return Reconstructions(found.title, tuple(map(_shown, found.columns)))


def _shown(column: Reconstruction) -> Shown:
    pictures = [("image", data_uri(column.image)), ("what the model sees", data_uri(column.masked))]
    pictures += [
        (what, data_uri(outlined(enlarged(pixels), column.hidden))) for what, pixels in column.painted.items()
    ]
    return Shown(column.name, tuple(pictures), " ".join(column.said.split()))
