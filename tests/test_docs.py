"""README and docs name only what exists: links, files, commands, flags, settings and metrics."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from beit_dist.config import TrainConfig, load_recipe
from beit_dist.engine.metrics import METRICS, TOKENIZER_METRICS

REPOSITORY = Path(__file__).resolve().parents[1]
ALL_METRICS = (*METRICS, *(metric for metric in TOKENIZER_METRICS if metric not in METRICS))
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]

FOLDERS = ("beit_dist", "cluster", "configs", "docs", "tests", "tools", ".ci")
NAMED = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*[\w/]")
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


@functools.cache
def flags(program: str) -> frozenset[str]:
    """The options in a command's ``--help``."""
    command = [sys.executable, program, "--help"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True).stdout
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown))


def calls() -> list[tuple[str, str, list[str]]]:
    """(page, program, its arguments) of every call of one of our programs in the pages."""
    found = []
    for page in PAGES:
        for words in commands(page):
            for position, word in enumerate(words):
                if re.fullmatch(r"(tools|beit_dist)/\w+\.py", word):
                    found.append((name(page), word, words[position + 1 :]))
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


def test_every_override_in_the_pages_is_a_setting() -> None:
    for page, program, arguments in calls():
        if program == "beit_dist/train.py":
            recipe = arguments[arguments.index("--config") + 1]
            overrides = [argument for argument in arguments if re.match(r"[a-z_.]+=", argument)]
            if recipe != "...":
                assert load_recipe(TrainConfig, REPOSITORY / recipe, overrides), page


def test_every_setting_that_a_page_names_exists() -> None:
    sections = {
        field
        for field in TrainConfig.model_fields
        if hasattr(type(TrainConfig.model_fields[field].default), "model_fields")
    }
    unknown = []
    for page in PAGES:
        for section, field in re.findall(
            r"`([a-z_]+)\.(?!jsonl`|safetensors`|pth`)([a-z_]+)(?::[^`]*)?`", page.read_text()
        ):
            if section in sections and field not in type(TrainConfig.model_fields[section].default).model_fields:
                unknown.append(f"{name(page)}: {section}.{field}")
    assert not unknown, "\n".join(unknown)


def test_every_make_target_in_the_pages_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for page in PAGES for words in commands(page) if words[0] == "make" and len(words) > 1}
    assert named <= targets


def test_the_table_of_metrics_is_the_one_of_the_code() -> None:
    endings = {"counter": "_total", "info": "_info"}
    expected = [
        (metric.name + endings.get(metric.kind, ""), metric.kind, ", ".join(metric.labels), metric.help)
        for metric in ALL_METRICS
    ]
    rows = re.findall(
        r"^\| `(beit_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", (REPOSITORY / "docs/metrics.md").read_text(), re.M
    )
    documented = [(metric, kind, labels.replace("`", "").strip(), text) for metric, kind, labels, text in rows]
    assert documented == expected


def test_every_metric_in_a_query_is_exported() -> None:
    exported = {
        metric.name + {"counter": "_total", "info": "_info"}.get(metric.kind, "") for metric in ALL_METRICS
    }
    text = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"\bbeit_(?:train|data|checkpoint|build|tokenizer)_\w+", text)) <= exported
