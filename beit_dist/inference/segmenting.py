"""``beit predict`` for a segmentation: a label map of each image, and the share that each class has of it."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from beit_dist.errors import ConfigError, DataError
from beit_dist.images.decoding import Pixels
from beit_dist.images.labelled.reading import shown
from beit_dist.inference.collection import Collection
from beit_dist.inference.formats.table import Column
from beit_dist.inference.job import Work
from beit_dist.inference.label_map_files import hexadecimal, map_file, overlay_file, palette, shares
from beit_dist.inference.likelihoods import SHARE, ranked_columns, ranked_values
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.storage.place import Place

INDEX, MAPS, OVERLAYS = "predictions.json", "maps", "overlays"


class Wishes(NamedTuple):
    """What the user may choose."""

    top: int = 5
    """Classes of each image that the table has, at most."""
    overlays: bool = False
    thoroughly: bool = True
    """At the scales and mirrored, as the run's last measurement."""


class Segmenting(Work[Pixels]):
    """``maps/NAME.png`` for each image, ``overlays/NAME.png`` on request, and ``class_1``, ``share_1`` and so on.

    Args:
        model: what tells the classes.
        images: of which there are maps.
        out: the folder around them.
        wishes: what the user has chosen.

    Raises:
        DataError: the maps of two images would have one name, or one would lie outside ``out``.
    """

    made: ClassVar[str] = "predictions"
    layers = 1

    def __init__(self, model: SegmentationModel, images: Collection, out: Place, wishes: Wishes) -> None:
        super().__init__(model)
        self.classes, self.width = model.classes, len(model.classes)
        self.top = min(wishes.top, self.width)
        self._wishes = wishes
        self._images, self._out, self._predict = images, out, model.predict
        check_names(images)

    @property
    def first(self) -> int:
        """The number of the first class in the run's label maps, and in those that are written."""
        recipe = self.model.provenance.recipe or {}
        ids = (recipe.get("maps") or {}).get("ids")
        return int(ids[0]) if ids else 0

    @property
    def facts(self) -> dict[str, Any]:
        wishes = self._wishes._replace(top=self.top)
        colours = hexadecimal(palette(self.width))
        meanings = [
            {"id": self.first + number, "class": name, "colour": colour}
            for number, (name, colour) in enumerate(zip(self.classes, colours, strict=True))
        ]
        return {"classes": meanings, **wishes._asdict()}

    def prepare(self, image: Image.Image) -> Pixels:
        return self.model.prepare.whole(image)

    @torch.no_grad()
    def make(self, prepared: Sequence[Pixels], numbers: Sequence[int] | None) -> NDArray[np.float32]:
        found = []
        for row, pixels in enumerate(prepared):
            (segments,) = self._predict([pixels], thoroughly=self._wishes.thoroughly)
            if numbers is not None:
                self._write(map_name(self._images.files[numbers[row]].name), pixels, segments.labels)
            found.append(shares(segments.labels, self.width))
        return np.stack(found)[None]

    def columns(self) -> tuple[Column, ...]:
        return ranked_columns(self.top, SHARE)

    def values(self, read: Callable[[int], NDArray[np.float32]]) -> Mapping[str, Callable[[], Any]]:
        return ranked_values(lambda: read(0), self.classes, self.top, SHARE)

    def _write(self, name: str, pixels: Pixels, labels: Pixels) -> None:
        written = {MAPS: map_file(labels, self.first, self.width)}
        if self._wishes.overlays:
            written[OVERLAYS] = overlay_file(pixels, labels, self.width)
        folder, _, last = name.rpartition("/")
        for kind, content in written.items():
            place = self._out / f"{kind}/{folder}".rstrip("/")
            place.make()
            place.write(last, content)


def map_name(name: str) -> str:
    """The name of an image's map below ``maps``: as data of a segmentation have it."""
    return posixpath.splitext(name)[0] + ".png"


def check_names(images: Collection) -> None:
    """Refuse images whose maps cannot lie beside one another.

    Raises:
        DataError: two would have one name, or one would lie elsewhere.
    """
    seen: dict[str, int] = {}
    for number, file in enumerate(images.files):
        name = map_name(file.name)
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{shown(file)}: its map would lie outside --out. Rename it in its archive")
        if name in seen:
            first = shown(images.files[seen[name]])
            raise DataError(
                f"{first} and {shown(file)} would have the same map, {name}. Predict them into two folders"
            )
        seen[name] = number


def check_elsewhere(out: Place, images: Collection) -> None:
    """Refuse a folder for maps among the images: a restart would take the maps for images.

    Raises:
        ConfigError: it is among them.
    """
    if not out.is_local:
        return
    path = str(out.path.absolute())
    for source in images.files.sources:
        if not source.suffixes and (path + "/").startswith(source.path.rstrip("/") + "/"):
            raise ConfigError("--out", str(out), f"a folder outside of --images {source.path}")
