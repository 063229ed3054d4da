"""The tables of docs/settings.md: every setting with its type, default and meaning, as the code declares them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import Section
from beit_dist.config.run import RunConfig
from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.optimizers.table import OPTIMIZERS
from beit_dist.models.heads.targets import HEADS
from beit_dist.stream.masking.modes import MODES

KINDS: dict[str, type[RunConfig]] = {
    "pre-training": PretrainingConfig,
    "tokenizer": TokenizerConfig,
    "fine-tuning": FinetuningConfig,
}
"""The recipes, by what readers call what they train."""

CHOICES: dict[str, Mapping[str, Any]] = {
    "masking.mode": MODES,
    "model.target": HEADS,
    "optimizer.name": OPTIMIZERS,
}
"""Settings that name an entry of a table."""

_WORDS = {str: "text", bool: "`true` or `false`", int: "whole number", float: "number", NoneType: "null"}
_PAGE = re.compile(r"`docs/([\w-]+\.md)`")
_HEADING = "| setting | type | default | meaning |\n| --- | --- | --- | --- |\n"


def shared() -> str:
    """The settings of every kind of training."""
    return "".join(_tables(RunConfig, KINDS))


def own(kind: str) -> str:
    """The settings that one kind of training adds."""
    return "".join(_tables(KINDS[kind], {kind: KINDS[kind]}, known=RunConfig))


def _tables(
    schema: type[Section],
    kinds: Mapping[str, type[Section]],
    path: tuple[str, ...] = (),
    known: type[Section] | None = None,
) -> Iterator[str]:
    """A table of a section's own settings, then one for each section in it.

    Args:
        schema: the section whose settings are described.
        kinds: the same section of each recipe, for defaults and further remarks.
        path: names of the sections around it.
        known: a section whose settings are left out; what is added to the sections in it is not.
    """
    left_out = known.model_fields if known else {}
    for name, field in left_out.items():
        section, before = section_of(schema.model_fields[name]), section_of(field)
        if section is not None and section is not before:
            inner = {kind: section_of(of.model_fields[name]) or section for kind, of in kinds.items()}
            yield from _tables(section, inner, (*path, name), known=before)
    fields = {name: field for name, field in schema.model_fields.items() if name not in left_out}
    sections = {name: section for name, field in fields.items() if (section := section_of(field))}
    if rows := "".join(_row(name, schema, kinds, path) for name in fields if name not in sections):
        if path:
            yield f"### {'.'.join(path)}\n\n{_prose(schema.__doc__ or '')}\n\n"
        yield f"{_HEADING}{rows}\n"
    for name, section in sections.items():
        inner = {kind: section_of(of.model_fields[name]) or section for kind, of in kinds.items()}
        yield from _tables(section, inner, (*path, name))


def _row(name: str, schema: type[Section], kinds: Mapping[str, type[Section]], path: tuple[str, ...]) -> str:
    dotted = ".".join((*path, name))
    field = schema.model_fields[name]
    defaults = {kind: _default(section.model_fields[name]) for kind, section in kinds.items()}
    remarks = [_prose(field.description or "")]
    for kind, section in kinds.items():
        remark = section.model_fields[name].description
        if remark and remark != field.description:
            remarks.append(f"{kind.capitalize()}: {_prose(remark)}")
    cells = (f"`{dotted}`", type_of(dotted, field), _joined(defaults), " ".join(remarks))
    return f"| {' | '.join(cells)} |\n"


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds; None for a plain value."""
    parts = [part for part in _parts(field.annotation) if part is not NoneType]
    only = parts[0] if len(parts) == 1 else None
    return only if isinstance(only, type) and issubclass(only, Section) else None


def type_of(dotted: str, field: FieldInfo) -> str:
    """What a setting takes, in words: ``whole number ≥ 1 or null``."""
    if dotted in CHOICES:
        return _either([f"`{name}`" for name in CHOICES[dotted]])
    limits = _limits(field)
    parts = [f"{_type(part)}{limits if part in (int, float) else ''}" for part in _parts(field.annotation)]
    return _either(parts)


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type, null last."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(sorted(get_args(annotation), key=lambda part: part is NoneType))
    return (annotation,)


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _either([f"`{value}`" for value in inner])
    if origin is tuple:
        return f"{'list of' if inner[-1] is Ellipsis else len(inner)} {_WORDS[inner[0]]}s"
    if origin is dict:
        return "mapping"
    return _WORDS[annotation]


def _limits(field: FieldInfo) -> str:
    """The range of a number: ``≥ 1``, or ``> 0 and < 1``."""
    found = {
        sign: getattr(limit, name)
        for limit in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(limit, name, None) is not None
    }
    return " and".join(f" {sign} {_number(value)}" for sign, value in found.items())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value == {}:
        return "empty"
    return f"`{_literal(value)}`"


def _literal(value: Any) -> str:
    """A default as a recipe spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return value if isinstance(value, str) else _number(value, plain=True)


def _number(value: float, plain: bool = False) -> str:
    if value == 2**63:
        return "2⁶³"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value)}" if plain else f"{int(value):,}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    small = f"{float(mantissa):g}e{int(exponent)}"
    return small if int(exponent) < -2 else f"{value:g}"


def _joined(defaults: Mapping[str, str]) -> str:
    """One default, or that of each kind where they differ."""
    if len(set(defaults.values())) == 1:
        return next(iter(defaults.values()))
    return "; ".join(f"{kind} {value}" for kind, value in defaults.items())


def _either(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} or {parts[-1]}"


def _prose(text: str) -> str:
    """A docstring as Markdown on one line, its pages as links."""
    line = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return _PAGE.sub(r"[\1](\1)", line)
