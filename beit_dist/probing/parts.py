"""Features in files, a part of the images each: what is finished stays finished, whoever asks for it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_dist.storage.place import Place

_FORMAT = 1
_DIGITS = 16
"""Of a folder's name: other settings have another folder."""


class Parts:
    """The features of a list of images: fp32 (L, n, D) for each part of n images.

    A part is there whole or not at all, and its numbers do not depend on who made it or with which others.

    Args:
        out: folder around those of all probes.
        facts: all that the features depend on.
        images: how many there are.
        size: of a part.
        layers: L.
        width: D.
    """

    def __init__(
        self, out: Place, facts: Mapping[str, Any], *, images: int, size: int, layers: int, width: int
    ) -> None:
        self.images, self.size, self.layers, self.width = images, size, layers, width
        told = json.dumps({"format": _FORMAT, "images": images, "size": size, "facts": facts}, sort_keys=True)
        self._out = out
        self._folder = f"features-{hashlib.sha256(told.encode()).hexdigest()[:_DIGITS]}"
        self.place = out / self._folder

    def __len__(self) -> int:
        return -(-self.images // self.size)

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return 4 * self.layers * self.images * self.width

    def rows(self, part: int) -> range:
        """The images of a part."""
        return range(part * self.size, min(self.images, (part + 1) * self.size))

    def missing(self) -> list[int]:
        """Parts that are not there, in order."""
        names = [_name(part) for part in range(len(self))]
        sizes = self.place.sizes(names)
        return [part for part, name in enumerate(names) if sizes.get(name) != self.bytes_of(part)]

    def write(self, part: int, features: Tensor) -> None:
        """Keep the features (L, n, D) of a part."""
        content = features.cpu().numpy().astype("<f4", copy=False)
        self.place.make()
        self.place.write(_name(part), content.tobytes())

    def read(self, part: int, place: int) -> NDArray[np.float32]:
        """The features (n, D) of a part, of one of the layers."""
        found = np.empty((len(self.rows(part)), self.width), "<f4")
        self._read_into(found, part, place)
        return found

    def layer(self, place: int) -> Tensor:
        """The features (N, D) of all images, of one of the layers."""
        found = np.empty((self.images, self.width), "<f4")
        for part in range(len(self)):
            rows = self.rows(part)
            self._read_into(found[rows.start : rows.stop], part, place)
        return torch.from_numpy(found)

    def _read_into(self, found: NDArray[np.float32], part: int, place: int) -> None:
        memory = found.reshape(-1).view(np.uint8).data
        self.place.read_into(_name(part), place * len(memory), memory)

    def remove(self) -> None:
        """They are not needed any more."""
        self._out.remove_folder(self._folder)

    def bytes_of(self, part: int) -> int:
        """Of a part."""
        return 4 * self.layers * len(self.rows(part)) * self.width


def _name(part: int) -> str:
    return f"part-{part:06d}.f32"
