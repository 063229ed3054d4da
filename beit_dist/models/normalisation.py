"""uint8 pixels to what a network works with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from beit_dist.config.model import BackboneConfig


class Normalisation(nn.Module):
    """(x / 255 − mean) / std by channel, of patches as they lie in a shard: y, x, channel."""

    scale_and_shift: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self._affine = _pixel_affine(config)
        self.register_buffer("scale_and_shift", torch.from_numpy(self._affine.copy()), persistent=False)

    def reset_constants(self) -> None:
        """Compute the buffer anew, for a module that was built on the meta device."""
        self.scale_and_shift.copy_(torch.from_numpy(self._affine))

    def forward(self, patches: Tensor) -> Tensor:
        """(..., D) uint8 to fp32."""
        scale, shift = self._constants()
        return torch.addcmul(shift, patches.float(), scale)

    def reverse(self, values: Tensor) -> Tensor:
        """(..., D) fp32 as :meth:`forward` gives them, to fp32 between 0 and 255."""
        scale, shift = self._constants()
        return (values - shift) / scale

    def _constants(self) -> tuple[Tensor, Tensor]:
        # The numbers are kept as their bits in an int32 buffer: it follows the module to its device, while
        # casting the module to bf16, which would round them, leaves integers alone.
        scale, shift = self.scale_and_shift.view(torch.float32).unbind()
        return scale, shift


def _pixel_affine(config: BackboneConfig) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """(2, D): (x / 255 − mean) / std as one scale and one shift per value of a patch; fp32 bits as int32."""
    mean, std = np.array(config.pixel_mean), np.array(config.pixel_std)
    affine = np.tile(np.stack((1 / (255 * std), -mean / std)), config.patch_size**2)
    return affine.astype(np.float32).view(np.int32)
