"""torchvision for peers that import it for their data pipelines only, where it is not installed.

One built for CUDA does not load beside torch for the CPU, so tests do not install it.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest

_MODULES = ["transforms", "transforms.functional", "transforms.v2", "datasets", "datasets.folder", "models"]
_MODULES += ["models.feature_extraction", "ops", "ops.misc", "io", "utils"]


class _Anything(type):
    """A class whose every attribute is such a class too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Stub(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", _Anything(name, (), {}))


def stand_in_for_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stubs where ``import torchvision`` finds them, unless it works."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        for name in ("torchvision", *(f"torchvision.{module}" for module in _MODULES)):
            stub = _Stub(name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, stub)
