"""How settings are read: a YAML recipe, then ``key=value`` overrides, validated by a typed section.

What there is to set is in ``beit_dist/config.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from beit_dist.errors import ConfigError, UserError


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values cannot be changed after validation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Recipe = TypeVar("Recipe", bound=Section)


def load_recipe(schema: type[Recipe], path: str | Path | None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe, apply ``key=value`` overrides in order, and validate the result.

    Args:
        schema: the recipe's type.
        path: YAML file; None starts from the defaults.
        overrides: ``optimizer.lr=1e-3`` and the like; values are YAML.

    Raises:
        ConfigError: a key is unknown, a type is wrong, or settings contradict each other.
    """
    tree = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    return validate(schema, tree)


def validate(schema: type[Recipe], tree: Mapping[str, Any]) -> Recipe:
    """Validate a plain mapping against ``schema``; every fault is reported, not only the first."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        listed: set[str] = set()
        faults = [_explain(schema, fault, listed) for fault in error.errors(include_url=False)]
        if len(faults) == 1:
            raise faults[0] from None
        raise UserError("\n       ".join(str(fault) for fault in faults)) from None


def exact(number: float) -> Fraction:
    """The decimal number that somebody wrote: 1.1 is eleven tenths, of which the binary number is a little more.

    Raises:
        ValueError: it is not finite.
    """
    return Fraction(repr(float(number)))


def near_divisors(number: int, wanted: int) -> str:
    """The divisors of ``number`` nearest to ``wanted``, as a list in words."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    nearest = sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:4])
    return ", ".join(map(str, nearest))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, which plain YAML silently resolves to the last."""


def _construct_unique(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ConfigError(str(key), "the key twice", "it once", f"See line {key_node.start_mark.line + 1}.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _construct_unique)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("--config", str(path), "a readable YAML file", error.strerror or "") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError("--config", str(path), "valid YAML", " ".join(str(error).split())) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("--config", str(path), "a YAML mapping of settings")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(override, override, "an override of the form key=value, such as optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(key, text, "a YAML value") from None
    *parents, last = key.split(".")
    for parent in parents:
        section = tree.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(key, text, f"{parent} to be a section, but the recipe gives it a value")
        tree = section
    tree[last] = value


def _explain(schema: type[Section], fault: Mapping[str, Any], listed: set[str]) -> ConfigError:
    """One fault of pydantic's in our words; what a section knows is said once, and noted in ``listed``."""
    path = [part for part in fault["loc"] if isinstance(part, str)]
    field = ".".join(path)
    if fault["type"] == "extra_forbidden":
        known = sorted(_section(schema, path[:-1]).model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
        way_out = f"Did you mean {'.'.join([*path[:-1], close[0]])}?" if close else ""
        section, expected = ".".join(path[:-1]), "one of the known settings"
        if section not in listed:
            listed.add(section)
            expected += f": {', '.join(known)}"
        return ConfigError(field, fault["input"], expected, way_out)
    if fault["type"] == "missing":
        return ConfigError(
            field, None, "a value", f"Set it in the recipe or give {field}=... on the command line."
        )
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return ConfigError(field, fault["input"], message.removeprefix("input should be "))


def _section(schema: type[Section], path: list[str]) -> type[Section]:
    for name in path:
        annotation = schema.model_fields[name].annotation
        choices = [annotation, *get_args(annotation)]
        schema = next(c for c in choices if isinstance(c, type) and issubclass(c, Section))
    return schema
