"""What the optimizer does to each parameter: whether its weights decay, and its share of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float, depth: int) -> list[dict[str, Any]]:
    """The optimizer's groups of (name, parameter), from the first layer to the last; in each, ``decay`` first.

    With layer-wise decay, layer i of 0 ... depth + 1 learns at ``layer_decay ** (depth + 1 - i)`` of the
    schedule's rate (unilm ``run_class_finetuning.py``). A decay of 1 makes no difference between layers, and two
    groups in all.

    Args:
        model: with unilm's names.
        weight_decay: of the parameters that decay.
        layer_decay: in (0, 1].
        depth: number of blocks.

    Returns:
        ``name``, ``params``, ``weight_decay`` and ``lr_share`` of each group that has parameters.
    """
    last = depth + 1
    found: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        layer = last if layer_decay == 1 else layer_of(name, depth)
        found.setdefault((layer, not is_decayed(name, parameter.shape)), []).append((name, parameter))
    return [
        {
            "name": ("" if layer_decay == 1 else f"layer_{layer}_") + ("no_decay" if spared else "decay"),
            "params": found[layer, spared],
            "weight_decay": 0.0 if spared else weight_decay,
            "lr_share": layer_decay ** (last - layer),
        }
        for layer, spared in sorted(found)
    ]


def layer_of(name: str, depth: int) -> int:
    """The layer a parameter belongs to (unilm ``optim_factory.py``, ``get_num_layer_for_vit``).

    0 is what comes before the blocks, i block i - 1, and depth + 1 all that comes after: heads, necks, and a
    relative position table that all blocks share.
    """
    part, *rest = name.split(".")
    if part in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    return int(rest[0]) + 1 if part == "blocks" else depth + 1


def is_decayed(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies to a parameter (unilm ``optim_factory.py``).

    Vectors, biases, the class token and absolute positions are spared; the mask token and relative position
    tables are not.
    """
    return len(shape) > 1 and name not in ("cls_token", "pos_embed") and not name.endswith(".bias")
