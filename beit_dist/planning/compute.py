"""How long the arithmetic of a step takes."""

from __future__ import annotations

from dataclasses import dataclass

from beit_dist.engine.task import OPERATIONS
from beit_dist.planning.devices import Device, Figure

LAUNCH = 10e-6
"""Seconds in which a host starts one kernel. Assumed; the time of an eager PyTorch operation."""
KERNELS = {False: 76, True: 25}
"""Kernels of a block, forward and backward, by ``compile``: 76 operations that are no views (counted on the meta
device), of which a compiled block fuses about two thirds (assumed)."""
_AGAIN = 2
"""Operations for each multiply-add of a forward pass that is run a second time (``activation_checkpointing``)."""

UPDATED = 60
"""Bytes that an fp32 update moves for each value: gradient flattened (8), scaled (8) and its norm taken (4), AdamW
(16 read, 12 written), the weight copied back (8), the gradient cleared (4)."""


@dataclass(frozen=True)
class Compute:
    """The arithmetic of one micro-batch."""

    arithmetic: float
    """Seconds of its FLOPs over peak × MFU."""
    launches: float
    """Seconds in which the host starts its kernels: no micro-batch takes less."""

    @property
    def seconds(self) -> float:
        """The longer of both, as they run side by side."""
        return max(self.arithmetic, self.launches)

    @property
    def backward(self) -> float:
        """Seconds of its backward pass: two thirds."""
        return self.seconds * 2 / 3


def compute(
    multiply_adds: int,
    rows: int,
    device: Device,
    precision: str,
    mfu: Figure,
    *,
    depth: int,
    compiled: bool,
    recompute: bool,
) -> Compute:
    """What a micro-batch takes.

    Args:
        multiply_adds: of one sample's forward pass.
        rows: samples of the micro-batch.
        depth: transformer blocks.
        compiled: they are.
        recompute: their forward pass is run again for the backward pass.
    """
    operations = (OPERATIONS + (_AGAIN if recompute else 0)) * multiply_adds * rows
    launches = 0.0 if device.is_cpu else depth * KERNELS[compiled] * LAUNCH
    return Compute(operations / (device.peaks[precision] * mfu.value), launches)


def update_seconds(parameters: int, ranks: int, stage: int, device: Device) -> float:
    """What the update takes beside forward and backward pass.

    On a GPU nothing: the MFU that was measured through the trainer includes it.
    """
    if not device.is_cpu:
        return 0.0
    return UPDATED * parameters / (ranks if stage else 1) / device.memory_rate
