"""What all readers of weights share: safetensors in memory, and names that may be shown to the user."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from beit_dist.errors import WeightsError


def parse_safetensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by name, and the metadata beside them.

    Raises:
        ValueError: why these are no whole safetensors, in one line.
    """
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except KeyError as error:
        raise ValueError(f"tensors of the type {error}, which is not read") from None
    except (SafetensorError, ValueError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return tensors, header.get("__metadata__") or {}


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse names of tensors that would steer a terminal or look like others.

    Raises:
        WeightsError: a name is not plain ASCII.
    """
    for name in names:
        if not (name.isascii() and name.isprintable()):
            raise WeightsError(f"{path}: got a tensor named {name[:80]!a}, expected a name in plain ASCII")
