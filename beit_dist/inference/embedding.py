"""``beit embed``: features of images as columns of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from beit_dist.images.decoding import Pixels
from beit_dist.inference.formats.table import Column
from beit_dist.inference.job import Work
from beit_dist.inference.model import LoadedModel

Token = Literal["mean", "class", "both"]
TOKENS: tuple[Token, ...] = ("mean", "class", "both")
"""What is taken of a layer: the mean of the patches, the class token, or both, in columns of their own."""


class Embedding(Work[Pixels]):
    """A column of vectors for each layer and kind of token: ``mean_8``, ``class_8``.

    Args:
        model: whose features are taken.
        layers: from 1, ascending.
        token: what is taken of each.
    """

    made: ClassVar[str] = "features"

    def __init__(self, model: LoadedModel, layers: Sequence[int], token: Token) -> None:
        super().__init__(model)
        self.chosen, self.token = tuple(layers), token
        self.kinds = ("mean", "class") if token == "both" else (token,)
        self.layers, self.width = len(self.chosen), len(self.kinds) * model.prepare.config.width

    @property
    def facts(self) -> dict[str, Any]:
        share = self.model.prepare.augmentation.evaluated_share(self.model.prepare.config.image_size)
        return {"layers": list(self.chosen), "token": self.token, "crop": share}

    def prepare(self, image: Image.Image) -> Pixels:
        return self.model.prepare(image)

    @torch.no_grad()
    def make(self, prepared: Sequence[Pixels], numbers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """(layers, n, width) of prepared images."""
        found = self.model.features(torch.from_numpy(np.stack(prepared)), layers=self.chosen)
        rows = []
        for layer in self.chosen:
            taken = {"mean": found[layer].patch_mean, "class": found[layer].class_token}
            rows.append(torch.cat([taken[kind] for kind in self.kinds], 1).float().cpu())
        return torch.stack(rows).numpy()

    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(self._title(layer, kind), "vector", self._size) for layer, kind in self._pairs())

    def values(self, read: Callable[[int], NDArray[np.float32]]) -> Mapping[str, Callable[[], Any]]:
        def of(layer: int, kind: str) -> Callable[[], NDArray[np.float32]]:
            start = self.kinds.index(kind) * self._size
            return lambda: read(self.chosen.index(layer))[:, start : start + self._size]

        return {self._title(layer, kind): of(layer, kind) for layer, kind in self._pairs()}

    @property
    def _size(self) -> int:
        return self.model.prepare.config.width

    def _pairs(self) -> list[tuple[int, str]]:
        return [(layer, kind) for layer in self.chosen for kind in self.kinds]

    @staticmethod
    def _title(layer: int, kind: str) -> str:
        return f"{kind}_{layer}"
