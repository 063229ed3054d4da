"""Which settings of a recipe do nothing, as what it chose from the tables does not look at them."""

from __future__ import annotations

from collections.abc import Iterator

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import Section, entry_of
from beit_dist.models.heads.targets import HEADS, head_of
from beit_dist.stream.masking.modes import MODES


def unused_settings(config: PretrainingConfig) -> list[str]:
    """Settings that the recipe gives and that what it chose does not look at, by their dotted names."""
    mode, head = entry_of("masking.mode", config.masking.mode, MODES), head_of(config.model)
    of_masks = MaskingConfig.model_fields.keys() - {"mode"} - mode.uses(config.masking)
    of_heads = frozenset().union(*(each.settings for each in HEADS.values())) - head.uses(config.model)
    unused = {f"masking.{name}" for name in of_masks} | {f"model.{name}" for name in of_heads}
    return [name for name in _given(config) if name in unused]


def _given(section: Section, prefix: str = "") -> Iterator[str]:
    """Dotted names of what was set, in the order of the recipe's type."""
    for name in type(section).model_fields:
        if name in section.model_fields_set:
            value = getattr(section, name)
            yield from _given(value, f"{prefix}{name}.") if isinstance(value, Section) else [prefix + name]
