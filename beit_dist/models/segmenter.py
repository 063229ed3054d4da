"""The fine-tuned segmenter: four blocks' outputs as maps of four sizes, and UPerNet on them.

As in the original (unilm ``semantic_segmentation/backbone/beit.py``), whose names the parameters have, but for the
``backbone.`` before those of the backbone and of its pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError
from beit_dist.models import dissected
from beit_dist.models.activations import backbone_activation_bytes
from beit_dist.models.batch_norm import BatchNorm
from beit_dist.models.initial_values import (
    convolution_default,
    fill,
    finetuning_value,
    generator_of,
    normal,
)
from beit_dist.models.upernet import FCNHead, UPerHead, head_deviation, resized
from beit_dist.models.vit import BeitBackbone

AUXILIARY_WIDTH = 256
"""Channels of the auxiliary head (unilm ``upernet_beit.py``)."""
AUXILIARY_MAP = 2
"""Which of the four maps it classifies: the one of the patches' own size (there too, ``in_index``)."""
_HEADS = ("fpn", "decode_head.", "auxiliary_head.")


class ImageSegmenter(BeitBackbone):
    """One logit a class for every pixel.

    Args:
        config: sizes and variant of the backbone. S is its ``image_size``: larger images are taken in windows.
        classes: K, their number.
        recompute: see :class:`BeitBackbone`.
        head_dropout: share of the channels that dropout takes before each head's classifier.
        group: whose images batch normalisation normalises together; see :class:`BatchNorm`.

    Raises:
        ConfigError: the grid of patches is too small to be halved.
    """

    def __init__(
        self,
        config: BackboneConfig,
        classes: int,
        *,
        recompute: bool = False,
        head_dropout: float = 0.1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(config, recompute=recompute, masks=False, final_norm=False)
        self.taps, self._head_gain = taps(config.depth), 1 / (1 - head_dropout)
        width = config.width
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = _pyramid(config, group)
        self.decode_head = UPerHead(width, classes, group)
        self.auxiliary_head = FCNHead(width, AUXILIARY_WIDTH, classes, group)

    def forward(  # type: ignore[override]
        self, patches: Tensor, keeps: Tensor | None = None, head_keeps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of UPerNet and of the auxiliary head, (B, K, S, S) each.

        Args:
            patches: (B, P, D), uint8 as they lie in a shard, or float on the same scale.
            keeps: (B, depth, 2) stochastic-depth keeps; see :meth:`BeitBackbone.encode`.
            head_keeps: (B, :func:`head_channels`), 1 where dropout keeps a channel and 0 where it takes it: those
                of UPerNet first. Kept ones are scaled up. None keeps all and scales none.
        """
        maps = self.pyramid(patches, keeps)
        factors: tuple[Tensor | None, ...] = (None, None)
        if head_keeps is not None:
            factors = torch.split(head_keeps * self._head_gain, [self.config.width, AUXILIARY_WIDTH], 1)
        size = (self.config.image_size, self.config.image_size)
        logits = resized(self.decode_head(maps, factors[0]), size)
        return logits, resized(self.auxiliary_head(maps[AUXILIARY_MAP], factors[1]), size)

    def pyramid(self, patches: Tensor, keeps: Tensor | None = None) -> list[Tensor]:
        """Four maps (B, C, height, width): of 4, 8, 16 and 32 pixels a cell with patches of 8 or 16."""
        grid, maps = self.config.grid, []
        for block, x in enumerate(self.layers(patches, keeps=keeps)):
            if block in self.taps:
                tapped = x[:, 1:].transpose(1, 2).reshape(len(x), -1, grid, grid)
                maps += [tapped] * self.taps.count(block)
        neck = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [level(tapped) for level, tapped in zip(neck, maps, strict=True)]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter, keyed by ``seed`` and the parameter's name: the same on every rank."""
        self.reset_constants()

        def draw(name: str, shape: Sequence[int]) -> Tensor:
            value = self._head_value(name, seed) if name.startswith(_HEADS) else None
            return finetuning_value(name, shape, self.config, seed) if value is None else value

        fill(self, draw)

    def reset_constants(self) -> None:
        """Compute all buffers anew, for a module that was built on the meta device, and forget all statistics."""
        super().reset_constants()
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.reset_statistics()

    def _head_value(self, name: str, seed: int) -> Tensor:
        """A parameter's value before fine-tuning, of what stands behind the backbone: fp32 on the CPU."""
        owner, _, kind = name.rpartition(".")
        module, shape = self.get_submodule(owner), self.get_parameter(name).shape
        if isinstance(module, nn.ConvTranspose2d):  # as PyTorch starts it, whose weight is (I, O, height, width)
            return convolution_default(shape, module.weight[0].numel(), generator_of(seed, name))
        if kind == "bias":
            return torch.zeros(shape)
        if isinstance(module, BatchNorm):
            return torch.ones(shape)
        deviation = head_deviation(shape, classifies=owner.endswith("conv_seg"))
        return normal(shape, deviation, generator_of(seed, name))


def taps(depth: int) -> tuple[int, int, int, int]:
    """The blocks whose outputs are used, from 0: after a third, a half, two thirds and all of them.

    Of 12 these are the original's 3, 5, 7, 11, and of 24 its 7, 11, 15, 23.
    """
    first, second, third = (max(0, depth * sixths // 6 - 1) for sixths in (2, 3, 4))
    return first, second, third, depth - 1


def head_channels(config: BackboneConfig) -> int:
    """Channels before the classifiers of both heads, which dropout may take."""
    return config.width + AUXILIARY_WIDTH


def multiply_adds(config: BackboneConfig, classes: int) -> int:
    """Multiply-adds of one image's forward pass, both heads included."""
    model, patches = _on_meta(config, classes, images=1)
    return dissected.multiply_adds(model.eval(), patches)


def activation_bytes(config: BackboneConfig, classes: int, size: int, recompute: bool) -> int:
    """Estimate of what one image keeps for the backward pass up to the logits.

    Args:
        size: bytes of a value in the model's precision.
        recompute: see :class:`BeitBackbone`.
    """
    # Blocks that are run again keep nothing that autograd sees, which leaves pyramid and heads to be counted.
    model, patches = _on_meta(config, classes, images=2, recompute=True)
    kept = dissected.saved_bytes(model if size == 4 else model.bfloat16(), patches) // 2
    return kept + backbone_activation_bytes(config, size, recompute)


def _on_meta(
    config: BackboneConfig, classes: int, *, images: int, recompute: bool = False
) -> tuple[ImageSegmenter, Tensor]:
    """A model without values, and patches for it."""
    with torch.device("meta"):
        model = ImageSegmenter(config, classes, recompute=recompute)
        patches = torch.empty(images, config.patches, config.patch_bytes, dtype=torch.uint8)
    return model.to("meta"), patches  # constants that are computed by NumPy were made elsewhere


def _pyramid(config: BackboneConfig, group: dist.ProcessGroup | None) -> list[nn.Module]:
    """What makes the four maps of those at the size of the grid.

    The original knows patches of 16 and of 8 pixels; those of another size are treated like the former.
    """
    width = config.width
    if config.grid < (needed := 4 if config.patch_size == 8 else 2):
        raise ConfigError(
            "model.image_size",
            config.image_size,
            f"at least {needed} patches of {config.patch_size} pixels along a side, for maps of half the size",
        )

    def twice() -> nn.Module:
        return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

    if config.patch_size == 8:
        return [
            nn.Sequential(twice()),
            nn.Identity(),
            nn.Sequential(nn.MaxPool2d(2)),
            nn.Sequential(nn.MaxPool2d(4)),
        ]
    finest = nn.Sequential(twice(), BatchNorm(width, group), nn.GELU(), twice())
    return [finest, nn.Sequential(twice()), nn.Identity(), nn.MaxPool2d(2)]
