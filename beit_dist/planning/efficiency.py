"""Which share of a device's peak a model reaches (MFU): measured where it was, else by one law from what was.

Of a step's time the products take a share s, and what moves memory (attention, norms, GELU) the rest. At another
width W the rest grows against the products by W₀ / W: it is proportional to the width, they to its square. On
another device and in another precision each follows its own rate, memory in values instead of bytes:

    MFU = MFU₀ / (s + (1 − s) · (W₀ / W) · (peak / peak₀) / (rate / rate₀))
"""

from __future__ import annotations

from dataclasses import dataclass

from beit_dist.planning.devices import GPUS, Device, Figure

REFERENCE_WIDTH = 768
"""Base, which was measured best."""


@dataclass(frozen=True)
class Law:
    """What was measured of base on a class of devices."""

    mfu: float
    products: float
    """s, the share of its time that products take."""
    source: str


H100 = {
    True: Law(0.280, 0.373, "base through the trainer, compiled"),
    False: Law(0.229, 0.352, "base through the trainer, eager"),
}
"""docs/performance.md, bf16, batch 256, by ``compile``. By a profile, products take 34.7 ms: of the bare
compiled step's 93.1 ms, and of 98.6 ms with a third of it eager."""
_TRAINER = 0.280 / 0.301
"""What the trainer leaves of the bare model's speed; of base."""
LARGE = {
    True: (0.346 * _TRAINER, "large bare (0.346), × 0.93, what the trainer leaves of base"),
    False: (0.296 * _TRAINER, "large bare (0.296), × 0.93, what the trainer leaves of base"),
}
_LARGE_WIDTH = 1024
CPU = Law(0.82, 0.8925, "base's step, of a product of matrices")
"""docs/performance.md: base 0.171 of 0.208 TFLOP/s, tiny 0.129 of them, from which s follows."""
_TINY = (192, 0.62, "tiny's step, of a product of matrices")
_CONVOLUTIONS = 0.2


def efficiency(device: Device, precision: str, width: int | None, compiled: bool, given: float | None) -> Figure:
    """The MFU of a model, and how it is known.

    Args:
        device: that it runs on.
        precision: of its products.
        width: of its transformer blocks; None for a model without any.
        compiled: ``compile`` of the recipe.
        given: the user's own figure, which is taken.
    """
    if given is not None:
        return Figure(given, "given: --mfu")
    if width is None:
        return Figure(_CONVOLUTIONS, "assumed, as no convolutions were measured")
    if device.is_cpu:
        return _of_cpu(width)
    first, law = GPUS["h100"], H100[compiled]
    if device.name == "h100" and precision == "bf16" and width == REFERENCE_WIDTH:
        return Figure(law.mfu, f"measured: {law.source}")
    if device.name == "h100" and precision == "bf16" and width == _LARGE_WIDTH:
        return Figure(*LARGE[compiled][:1], f"measured: {LARGE[compiled][1]}")
    size = 2 if precision == "fp32" else 1  # of a value, in those of bf16
    faster = (device.peaks[precision] / first.peaks["bf16"]) / (device.memory_rate / first.memory_rate / size)
    value = _by_law(law, width, faster)
    return Figure(value, f"assumed, by docs/scaling.md's law from {law.source} on an H100")


def _of_cpu(width: int) -> Figure:
    if width == REFERENCE_WIDTH:
        return Figure(CPU.mfu, f"measured: {CPU.source}")
    if width == _TINY[0]:
        return Figure(_TINY[1], f"measured: {_TINY[2]}")
    return Figure(_by_law(CPU, width, 1.0), "assumed, by docs/scaling.md's law from base on a CPU")


def _by_law(law: Law, width: int, faster: float) -> float:
    return law.mfu / (law.products + (1 - law.products) * REFERENCE_WIDTH / width * faster)
