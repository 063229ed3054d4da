"""``attention: kernel`` and ``fp8: true``: what they need of a machine, and how they reach a model.

Both take the place of what the model does by itself, with the same parameters under the same names:
checkpoints, exports and counted FLOPs are those of any run.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import torch
from torch import nn

from beit_dist.config.model import BackboneConfig
from beit_dist.config.vit import ViTRunConfig
from beit_dist.errors import ConfigError
from beit_dist.models.attention import Attention
from beit_dist.models.vit import BeitBackbone

OLDEST_TRITON = (3, 2)
"""That of PyTorch 2.6."""
OLDEST_TORCHAO = (0, 10)
_KERNEL_CAPABILITY = (8, 0)
_FP8_CAPABILITY = (8, 9)
_MOST_WIDTH = 128
_LIBRARY = "Set attention=library."
_NO_FP8 = "Set fp8=false."


@dataclass(frozen=True)
class FastPaths:
    """How a run computes the blocks of its backbone."""

    attention: str
    fp8: bool
    backbone: BackboneConfig

    @staticmethod
    def of(config: ViTRunConfig, backbone: BackboneConfig) -> FastPaths:
        """Those that a recipe asks for."""
        return FastPaths(config.attention, config.fp8, backbone)

    def check(self, device: str) -> None:
        """Refuse what cannot run here.

        Args:
            device: its type, ``cpu`` or ``cuda``.

        Raises:
            ConfigError: the device, a package or the sizes of the model are not what it takes.
        """
        if self.attention == "kernel":
            self._check_kernel(device)
        if self.fp8:
            self._check_fp8(device)

    def apply(self, model: nn.Module) -> None:
        """Have the model use them; parameters keep their values and names."""
        if self.attention == "kernel":
            # Here, not above: the module needs Triton, which only this setting requires.
            from beit_dist.models.kernels.attention import fused_attention

            for module in model.modules():
                if isinstance(module, Attention):
                    module.attend = fused_attention
        if self.fp8:
            from beit_dist.models.float8 import use_float8

            assert isinstance(model, BeitBackbone)
            use_float8(model)

    def rows(self) -> list[tuple[str, str]]:
        """What a start says of them."""
        attention = "by the Triton kernel" if self.attention == "kernel" else "by PyTorch"
        rows = [("attention", f"{attention} (attention={self.attention})")]
        if self.fp8:
            rows.append(("fp8", "products of the blocks in float8; head and embedding in bf16"))
        return rows

    def _check_kernel(self, device: str) -> None:
        width = self.backbone.width // self.backbone.heads
        if width > _MOST_WIDTH:
            expected = f"library with heads of {width} values: the kernel takes at most {_MOST_WIDTH}"
            raise ConfigError("attention", "kernel", expected, f"{_LIBRARY[:-1]}, or use more model.heads.")
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device != "cuda" and not interpreted:
            raise ConfigError(
                "attention", "kernel", f"library on a {device}: the kernel is written for GPUs", _LIBRARY
            )
        _check_package("attention", "kernel", "triton", OLDEST_TRITON, _LIBRARY)
        if not interpreted:
            _check_capability("attention", "kernel", _KERNEL_CAPABILITY, _LIBRARY)

    def _check_fp8(self, device: str) -> None:
        sides = {"model.width": self.backbone.width}
        sides["model.mlp_ratio · model.width"] = int(self.backbone.width * self.backbone.mlp_ratio)
        for name, side in sides.items():
            if side % 16:
                raise ConfigError(name, side, "a multiple of 16 with fp8", _NO_FP8)
        if device != "cuda":
            raise ConfigError("fp8", True, f"false on a {device}: it takes a GPU with float8 units", _NO_FP8)
        _check_capability("fp8", True, _FP8_CAPABILITY, _NO_FP8)
        way_out = f"Install it (pip install 'beit_dist[fp8]'). Or: {_NO_FP8}"
        _check_package("fp8", True, "torchao", OLDEST_TORCHAO, way_out)


def _check_capability(field: str, got: object, least: tuple[int, int], way_out: str) -> None:
    found = torch.cuda.get_device_capability()
    if found < least:
        name, (major, minor) = torch.cuda.get_device_name(), found
        raise ConfigError(
            field,
            got,
            f"a GPU of compute capability {least[0]}.{least[1]} or above; {name} has {major}.{minor}",
            way_out,
        )


def _check_package(field: str, got: object, package: str, oldest: tuple[int, int], way_out: str) -> None:
    """Refuse a package that is missing, too old, or cannot be imported beside this PyTorch."""
    wanted = f"{package} {oldest[0]}.{oldest[1]} or newer"
    try:
        version = str(importlib.import_module(package).__version__)
    except ImportError as error:
        raise ConfigError(field, got, f"{wanted}, which cannot be imported ({error})", way_out) from None
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        raise ConfigError(field, got, f"{wanted}; {version} is installed", way_out)
