"""How settings are read: a YAML recipe, then ``key=value`` overrides, validated by a typed section.

The settings themselves are in the other modules of ``beit_dist/config/``.
"""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo

from beit_dist.errors import ConfigError, UserError

_MOST_BYTES = 16 << 20
"""Largest file of settings. Something larger was named by mistake: a file of weights, or a device."""
_NO_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)
"""What PyYAML raises: its own error, and others for invalid dates and numbers, keys that are lists, deep
nesting."""


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
Entry = TypeVar("Entry")


def load_recipe(
    schema: type[Recipe],
    path: str | Path | None,
    overrides: Iterable[str] = (),
    *,
    flags: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a YAML recipe, apply ``key=value`` overrides in order, and validate the result.

    Args:
        schema: the recipe's type.
        path: YAML file; None starts from the defaults.
        overrides: ``optimizer.lr=1e-3`` and the like; values are YAML.
        flags: settings from the command line; they replace those of the file.
        defaults: values for settings that nothing else sets.

    Raises:
        ConfigError: a key is unknown, a type is wrong, or settings contradict each other.
    """
    return validate(schema, read_settings(path, overrides, flags=flags, defaults=defaults))


def read_settings(
    path: str | Path | None,
    overrides: Iterable[str] = (),
    *,
    flags: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What :func:`load_recipe` validates, as it was given."""
    tree = {**({} if path is None else _read_yaml(Path(path))), **(flags or {})}
    for override in overrides:
        _apply(tree, override)
    return filled(tree, defaults or {})


def validate(schema: type[Recipe], tree: Mapping[str, Any]) -> Recipe:
    """Validate a plain mapping against ``schema``. Every fault is reported, not only the first."""
    return _validated(schema, tree)


def is_recorded(info: ValidationInfo) -> bool:
    """Whether an earlier start recorded these settings; the places they name need not exist any more."""
    return bool((info.context or {}).get("recorded"))


def _validated(schema: type[Recipe], tree: Mapping[str, Any], recorded: bool = False) -> Recipe:
    try:
        return schema.model_validate(tree, context={"recorded": recorded})
    except ValidationError as error:
        listed: set[str] = set()
        faults = [_explain(schema, fault, listed) for fault in error.errors(include_url=False)]
        if len(faults) == 1:
            raise faults[0] from None
        raise UserError("\n       ".join(str(fault) for fault in faults)) from None


def entry_of(field: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of a table that the setting ``field`` names.

    Raises:
        ConfigError: nothing there has that name.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1, cutoff=0.6)
    raise ConfigError(field, name, f"one of {', '.join(table)}", f"Did you mean {close[0]}?" if close else "")


def recorded(schema: type[Recipe], tree: Mapping[str, Any]) -> Recipe:
    """A recipe that another version wrote into a run folder, as this version reads it.

    A setting that is missing did not exist then; today's default is what that version did. A setting that this
    version no longer has is dropped.

    Raises:
        ConfigError: this version does not accept a value.
    """
    return _validated(schema, _known(schema, tree), recorded=True)


def _known(schema: type[Section], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a mapping that ``schema`` knows, nested mappings included."""
    found = {name: value for name, value in tree.items() if name in schema.model_fields}
    for name, value in found.items():
        if isinstance(value, Mapping) and (section := _section_type(schema, name)) is not None:
            found[name] = _known(section, value)
    return found


def exact(number: float) -> Fraction:
    """The decimal number that somebody wrote: 1.1 is eleven tenths, although the binary number is a little more.

    Raises:
        ValueError: it is not finite.
    """
    return Fraction(repr(float(number)))


def near_divisors(number: int, wanted: int) -> str:
    """The four divisors of ``number`` nearest to ``wanted``, as text."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    nearest = sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:4])
    return ", ".join(map(str, nearest))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice. Plain YAML silently takes the last one."""


def _construct_unique(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), f"See line {key_node.start_mark.line + 1}."
        if not isinstance(key, str):
            raise ConfigError(str(key), key, "a name as the key", f"If it is a name, put it in quotes. {line}")
        if key in seen:
            raise ConfigError(key, "the key twice", "the key once", line)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _construct_unique)


def read_text(field: str, path: str | Path, kind: str) -> str:
    """The text of a file: UTF-8, with or without a byte order mark.

    Args:
        field: the option that names it.
        path: the file, or a pipe.
        kind: ``YAML`` or ``JSON``, for messages.

    Raises:
        ConfigError: the file cannot be read, or is not such a file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
        raise ConfigError(
            field, str(path), f"a readable {kind} file", getattr(error, "strerror", "") or ""
        ) from None
    expected, way_out = f"a {kind} file: text in UTF-8", ""
    if len(content) > _MOST_BYTES:
        raise ConfigError(field, str(path), f"{expected}, up to {_MOST_BYTES >> 20} MiB")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(field, str(path), expected, "The file is in UTF-16. Save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        way_out = f"Byte {error.start}, in line {line}, is not UTF-8. Save the file as UTF-8."
        raise ConfigError(field, str(path), expected, way_out) from None
    if "\0" in text:
        raise ConfigError(
            field, str(path), expected, "The file holds null bytes. Is it the right file, and not in UTF-16?"
        )
    return text


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_text("--config", path, "YAML")
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except _NO_YAML as error:
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
    except _NO_YAML:
        raise ConfigError(key, text, "a YAML value") from None
    *parents, last = key.split(".")
    for parent in parents:
        section = tree.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(key, text, f"{parent} to be a section, but the recipe gives it a value")
        tree = section
    tree[last] = value


def filled(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with defaults where they say nothing, in sections too."""
    whole = {**defaults, **tree}
    for name, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(given := whole[name], Mapping):
            whole[name] = filled(given, default)
    return whole


def _explain(schema: type[Section], fault: Mapping[str, Any], listed: set[str]) -> ConfigError:
    """One of pydantic's faults in our words. The settings of a section are listed once; ``listed`` notes which."""
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
            field, None, "a value", f"Set it in the recipe, or give {field}=... on the command line."
        )
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return ConfigError(field, fault["input"], message.removeprefix("input should be "))


def _section(schema: type[Section], path: list[str]) -> type[Section]:
    for name in path:
        schema = _section_type(schema, name) or schema
    return schema


def _section_type(schema: type[Section], name: str) -> type[Section] | None:
    """The type of a field that is a section; None for any other field."""
    annotation = schema.model_fields[name].annotation
    choices = [annotation, *get_args(annotation)]
    return next((c for c in choices if isinstance(c, type) and issubclass(c, Section)), None)
