"""The images of a tokenizer's training: which are trained on, and which are kept to measure."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.draws import Purpose, permutation
from beit_dist.engine.durations import counted
from beit_dist.engine.refusal import RefusedError
from beit_dist.engine.task import StartStopped, Surroundings
from beit_dist.errors import CheckpointError, ConfigError, DataError, UserError
from beit_dist.images.crops import CropBatches, ImagePool, centred_view
from beit_dist.images.files import ImageFile, find_images, is_of_sizes
from beit_dist.images.left_out import LeftOut


class Pictures:
    """Images by source, read once.

    Args:
        config: the recipe.
        sniff: look into files at URLs whose names do not tell what they are.

    Attributes:
        pool: all of ``data``, decoded as far as memory allows; once they are read.
        trained_on: numbers of the images in it that are trained on.
        held_out: uint8 ``(N, 3, view_size, view_size)`` on the CPU, the same on every rank.
        held_out_names: of their files.
        digest: of all images.
    """

    def __init__(self, config: TokenizerConfig, sniff: bool) -> None:
        self._config, self._sniff = config, sniff
        self._files: list[ImageFile] = []
        self._held_out_files: list[ImageFile] = []
        self.pool: ImagePool
        self.trained_on: list[int]
        self.held_out: Tensor
        self.held_out_names: list[str]
        self.digest: str

    @property
    def found(self) -> int:
        """Images of ``data``."""
        return len(self._files)

    @property
    def were_read(self) -> bool:
        """Whether :meth:`read` has come to its end."""
        return hasattr(self, "held_out_names")

    @property
    def kept_aside(self) -> int:
        """Of these, how many are not trained on."""
        return 0 if self._config.validation.data else self._config.held_out

    def find(self, *, loud: bool) -> None:
        """List the images.

        Args:
            loud: say what was left out.

        Raises:
            ConfigError: no source is given.
            DataError: there are none, or the source is damaged.
        """
        config = self._config
        if config.data is None:
            raise ConfigError("data", None, "a folder or tar of images, here or at a URL", "Add --images SRC.")
        self._files = self._find("data", config.data, loud)
        if len(self._files) <= self.kept_aside:
            raise DataError(
                f"data: got {len(self._files)} images, expected more than the {self.kept_aside} of held_out. Give "
                "more images, or lower held_out."
            )
        if config.validation.data is not None:
            found = self._find("validation.data", config.validation.data, loud)
            order = permutation(config.seed, Purpose.SOURCE_ORDER, (), len(found)).tolist()
            self._held_out_files = [found[number] for number in order[: config.validation.samples]]
            if both := set(map(str, self._files)) & set(map(str, self._held_out_files)):
                where, expected = str(config.validation.data), "images that are not trained on"
                raise ConfigError("validation.data", where, f"{expected}, but {min(both)} is")

    def read(self, around: Surroundings, saved: Mapping[str, Any] | None) -> None:
        """Read the images. Collective.

        Args:
            saved: manifest of the run that is continued.

        Raises:
            StartStopped: a rank was asked to stop meanwhile.
            DataError: there are too few, or the ranks see different ones.
            CheckpointError: the run was begun on others.
        """
        config = self._config
        if saved is not None and saved["kept_aside"] != self.kept_aside:
            raise CheckpointError(
                f"run {config.run} cannot be continued: it kept {saved['kept_aside']} images of data aside, "
                f"and this start keeps {self.kept_aside}, with validation.data={config.validation.data!r}. Set it "
                "back, or choose another run folder."
            )
        lower = ", or lower held_out" if self.kept_aside else ""
        self.pool = self._read("data", self._files, self.kept_aside + 1, around, lower)
        if saved is not None and not self.pool.has_digest(saved["images"]):
            raise CheckpointError(f"run {config.run} cannot be continued: {_other_images(saved['images'])}")
        self.digest = self.pool.digest
        order = permutation(config.seed, Purpose.SOURCE_ORDER, (), len(self.pool)).tolist()
        self.trained_on = order[self.kept_aside :]
        measured, numbers = self.pool, order[: self.kept_aside]
        if self._held_out_files:
            measured = self._read("validation.data", self._held_out_files, 1, around, "")
            numbers = list(range(len(measured)))
        self.held_out = self._views(measured, numbers)
        self.held_out_names = [measured.name_of(number) for number in numbers]

    def batches(self, batch: int, workers: int, rows: range | None = None, first: int = 0) -> CropBatches:
        """Crops of the images that are trained on; see :class:`CropBatches`."""
        config = self._config
        return CropBatches(
            self.pool,
            self.trained_on,
            batch=batch,
            side=config.image_size,
            scale=config.crop_scale,
            share=config.image_size / config.view_size,
            seed=config.seed,
            workers=workers,
            rows=rows,
            first=first,
        )

    def first_crops(self, count: int) -> Tensor:
        """The first crops of a training, whatever its batch: uint8 ``(count, 3, image_size, image_size)``."""
        with closing(self.batches(count, workers=1)) as batches:
            crops = batches.next_unless(lambda: False)
        assert crops is not None
        return torch.from_numpy(crops.pixels)

    def training_views(self, most: int) -> Tensor:
        """Some of the images that are trained on, made like those held out: uint8 ``(N, 3, side, side)``."""
        return self._views(self.pool, self.trained_on[:most])

    def _views(self, pool: ImagePool, numbers: Sequence[int]) -> Tensor:
        views = [centred_view(pool[number], self._config.view_size) for number in numbers]
        return torch.from_numpy(np.stack(views).transpose(0, 3, 1, 2).copy())

    def _find(self, field: str, source: str | tuple[str, ...], loud: bool) -> list[ImageFile]:
        left_out = LeftOut()
        try:
            files = find_images(source, self._config.storage.access, sniff=self._sniff, left_out=left_out)
        except ConfigError as error:  # which knows the commands' option only
            raise error.named(field) if field != "data" else error from None
        if loud:
            for line in left_out.lines():
                print(line, flush=True)
        return files

    def _read(
        self, field: str, files: list[ImageFile], least: int, around: Surroundings, way_out: str
    ) -> ImagePool:
        config, agreement, stop = self._config, around.agreement, around.stop
        needed = math.ceil(config.view_size / config.crop_scale[0])
        budget = int(config.cache_gib * 2**30)
        access = config.storage.access
        pool, fault = None, None
        try:
            pool = ImagePool(files, needed, budget, config.workers, least, access, lambda: stop.known, way_out)
        except UserError as error:  # perhaps on this host only
            fault = error
        ends = agreement.gather((stop.known, fault and (str(fault), fault.exit_code)))
        if any(stopped for stopped, _ in ends):
            raise StartStopped
        if fault or pool is None:
            raise fault or RefusedError(*next(end for _, end in ends if end))
        if pool.rejected and agreement.ranks.rank == 0:
            print(
                f"{field}: {counted(len(pool.rejected), 'image')} left out, the first is {pool.rejected[0]}",
                flush=True,
            )
        found = agreement.gather((socket.gethostname(), len(pool), pool.digest))
        others = [
            f"rank {rank} on {host} has {count}"
            for rank, (host, count, own) in enumerate(found)
            if own != found[0][2]
        ]
        if others:
            raise DataError(
                f"the ranks see different images: rank 0 on {found[0][0]} has {found[0][1]}, "
                f"{'; '.join(others[:4])}. Give all hosts the same folder or tars."
            )
        return pool


def _other_images(digest: str) -> str:
    """Why the images are not those of a checkpoint that was made with ``digest``."""
    if is_of_sizes(digest):
        return (
            "it was begun on other images, or by an older version, which lists or rejects some images "
            "differently. Start again in another run folder, or finish with the old version."
        )
    return (
        "it was begun on other images. (Where some cannot be decoded, another cache_gib changes which are found; "
        "another version may list or reject some differently.) Give the same images, or choose another run folder."
    )
