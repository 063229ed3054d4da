"""README and docs name only what exists: links, files, commands, flags, settings and metrics."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic.fields import FieldInfo
from support.records import tables

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import Section, load_recipe
from beit_dist.config.recipes import named
from beit_dist.config.run import RunConfig
from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.optimizers.table import OPTIMIZERS, kept_values

REPOSITORY = Path(__file__).resolve().parents[1]
ALL_METRICS = {metric for table in tables().values() for metric in table}
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]

FOLDERS = ("beit_dist", "cluster", "configs", "docs", "tests", "tools", ".ci")
NAMED = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*[\w/]")
FILES = (".jsonl", ".safetensors", ".pth", ".png", ".json", ".pkl", ".yaml")
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    """A page as its readers call it."""
    return str(page.relative_to(REPOSITORY))


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get from their words."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's shell blocks; continued lines joined, comments left out."""
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and "=" in words[0]:
                words = words[1:]  # settings of the environment
            if words:
                yield words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken, f"{name(page)} links to what is not there: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    missing = sorted({path for path in NAMED.findall(page.read_text()) if not (REPOSITORY / path).exists()})
    assert not missing, f"{name(page)} names what is not there: {missing}"


PROGRAM = re.compile(r"(tools|beit_dist)/\w+\.py")


@functools.cache
def flags(program: str) -> frozenset[str]:
    """The options in a command's ``--help``."""
    file, *name = program.split()
    command = [sys.executable, *(["-m", "beit_dist"] if file == "beit" else [file]), *name, "--help"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True).stdout
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown))


def calls() -> list[tuple[str, str, list[str]]]:
    """(page, program, its arguments) of every call of one of our programs in the pages."""
    found = []
    for page in PAGES:
        for words in commands(page):
            for position, word in enumerate(words):
                rest = words[position + 1 :]
                if PROGRAM.fullmatch(word):
                    found.append((name(page), word, rest))
                elif word == "beit_dist.train":
                    found.append((name(page), "beit train", rest))
                elif word in ("beit", "beit_dist") and rest and not rest[0].startswith("-"):
                    found.append((name(page), f"beit {rest[0]}", rest[1:]))
    return found


@pytest.mark.parametrize("program", sorted({program for _, program, _ in calls()}))
def test_every_flag_in_the_pages_is_one_of_the_commands(program: str) -> None:
    unknown = [
        f"{page}: {program} {argument}"
        for page, called, arguments in calls()
        if called == program
        for argument in arguments
        if argument.startswith("--") and argument.partition("=")[0] not in flags(program)
    ]
    assert not unknown, "\n".join(unknown)


def test_every_override_in_the_pages_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for page, program, arguments in calls():
        if program in ("beit_dist/train.py", "beit train") and "--config" in arguments:
            recipe = arguments[arguments.index("--config") + 1]
            overrides = [argument for argument in arguments if re.match(r"[a-z_.]+=", argument)]
            if recipe not in ("...", "mine.yaml"):
                assert load_recipe(PretrainingConfig, named("pretraining", recipe), ["run=r", *overrides]), page


def test_every_setting_that_a_page_names_exists() -> None:
    known = {dotted for recipe in (PretrainingConfig, TokenizerConfig) for dotted, _ in settings(recipe)}
    sections = {dotted.partition(".")[0] for dotted in known if "." in dotted}
    unknown = [
        f"{name(page)}: {dotted}"
        for page in PAGES
        for dotted in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:[:=][^`]*)?`", page.read_text())
        if dotted.partition(".")[0] in sections
        and not dotted.endswith(FILES)
        and not any(setting == dotted or setting.startswith(f"{dotted}.") for setting in known)
        and not dotted.startswith("storage.options.")
    ]
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize("recipe", [PretrainingConfig, TokenizerConfig])
def test_every_setting_has_a_description_and_a_row_on_the_page(recipe: type[Section]) -> None:
    page = (REPOSITORY / "docs/settings.md").read_text()
    undescribed, missing = [], []
    for dotted, field in settings(RunConfig) + settings(recipe):
        inherited = dict(settings(RunConfig)).get(dotted)
        if not (field.description or (inherited and inherited.description)):
            undescribed.append(dotted)
        if f"\n| `{dotted}` | " not in page:
            missing.append(dotted)
    assert not undescribed, f"write a docstring below {undescribed}"
    assert not missing, f"run tools/doc_tables.py: {missing}"


def settings(section: type[Section], path: str = "") -> list[tuple[str, FieldInfo]]:
    """The dotted names and the fields of all settings of a section and of those in it."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found += settings(inner, f"{path}{name}.")
        else:
            found.append((path + name, field))
    return found


def test_every_make_target_in_the_pages_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for page in PAGES for words in commands(page) if words[0] == "make" and len(words) > 1}
    assert named <= targets


def test_the_tables_are_those_of_the_code(load_tool: Callable[[str], ModuleType]) -> None:
    assert load_tool("doc_tables").main(["--check"]) == 0, "run tools/doc_tables.py"


def test_the_table_of_optimizers_is_the_one_of_the_code() -> None:
    page = (REPOSITORY / "docs/optimizers.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|.* \| ([^|]*) \|$", page, re.M)
    assert [row[0] for row in rows] == list(OPTIMIZERS)
    for optimizer, kept, read in rows:
        own = set(kept_values(optimizer, {"blocks.0.attn.proj.weight": (1, 1)}))
        assert set(re.findall(r"`(\w+)`", kept)) == own
        assert set(re.findall(r"`(\w+)`", read)) == OPTIMIZERS[optimizer].uses


def test_every_metric_in_a_query_is_exported() -> None:
    exported = {
        metric.name + {"counter": "_total", "info": "_info"}.get(metric.kind, "") for metric in ALL_METRICS
    }
    text = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"\bbeit_(?:train|data|checkpoint|build|tokenizer)_\w+", text)) <= exported
