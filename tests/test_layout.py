"""The shape of the repository: imports point one way, names hide nothing, files stay small and name no machine."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "beit_dist"

LAYERS: list[set[str]] = [
    {"errors", "draws", "step_numbers"},
    {"storage", "lettering"},
    {"config"},
    {"models", "shards", "images"},
    {"checkpoints"},
    {"weights", "stream"},
    {"engine"},
    {"probing"},
    {"inference"},
    {"tasks", "tokenizing", "reports", "planning"},
    {"benches"},
    {"commands"},
    {"train", "__main__", "finetune", "tools"},
]
"""Parts of the system from the ground up; a part imports from lower layers only, so never from a sibling."""

LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}

LAZY = f"{PACKAGE}.inference.loading"
"""What the package itself imports, and only when its attribute ``load`` is asked for."""

MOST_LINES = 500

# Written in pieces, so that these lines do not match themselves.
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:home|Users|root|work|private|var/folders)/[\w.]")
REGISTRIES = re.compile(
    r"pypi\.(?:org|python)|python" + r"hosted\.org|download\.py" + r"torch\.org", re.IGNORECASE
)


def modules() -> dict[str, Path]:
    """Dotted names of all modules of the package and of the tools, with their files."""
    found = {}
    for folder in (PACKAGE, "tools"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Our own modules that a module imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: a relative import; write {PACKAGE}. ..."
            if node.module in known:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in known else node.module


def graph() -> dict[str, set[str]]:
    """Each of our modules with those of ours that it imports."""
    known = modules()
    found = {name: set(imports(name, path, known)) - {name} for name, path in known.items()}
    found[PACKAGE].discard(LAZY)
    return found


def part(module: str) -> str:
    """The part of the system a module belongs to; '' for the package itself, which holds the version only."""
    first, *rest = module.split(".")
    return "tools" if first == "tools" else (rest[0] if rest else "")


def test_every_part_has_a_layer() -> None:
    unplaced = {part(module) for module in modules()} - set(LEVEL) - {""}
    assert not unplaced, f"say in LAYERS where these belong: {sorted(unplaced)}"


def test_imports_point_one_way_and_siblings_do_not_import_one_another() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, found in graph().items()
        for imported in sorted(found)
        if part(imported) not in ("", part(module))
        and (not part(module) or LEVEL[part(imported)] >= LEVEL[part(module)])
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_loads_nothing_and_load_is_there() -> None:
    script = f"""
import sys, {PACKAGE}
loaded = {{name.partition(".")[0] for name in sys.modules}} & {{"torch", "numpy", "PIL", "pydantic"}}
assert not loaded and "load" in dir({PACKAGE}), loaded
assert "{LAZY}" not in sys.modules
assert {PACKAGE}.load.__module__ == "{LAZY}"
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=300)


def test_tools_do_not_import_one_another() -> None:
    wrong = [
        f"{m} imports {i}"
        for m, found in graph().items()
        if part(m) == "tools"
        for i in found
        if part(i) == "tools"
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = graph()
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in finished:
            for imported in sorted(edges[module]):
                visit(imported, (*trail, module))
            finished.add(module)

    for module in edges:
        visit(module, ())


def test_no_module_hides_an_importable_one() -> None:
    """``deepspeed beit_dist/train.py`` puts ``beit_dist/`` first on ``sys.path``."""
    names = {path.stem for path in (REPOSITORY / PACKAGE).iterdir() if path.suffix == ".py" or path.is_dir()}
    others = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    hidden = (names - {"__init__", "__pycache__"}) & (others - {PACKAGE})
    assert not hidden, f"{PACKAGE}/ hides {sorted(hidden)} of the standard library or of an installed package"


def committed() -> list[Path]:
    """Files that git has or would take; in a copy without git, all that lie in the folders of the layout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        folders = (PACKAGE, "cluster", "configs", "docs", "tests", "tools")
        return [path for folder in folders for path in (REPOSITORY / folder).rglob("*.*") if path.is_file()]
    return [path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file()]


def texts() -> Iterator[tuple[str, str]]:
    """Name and content of every committed text file."""
    for path in committed():
        try:
            yield str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture


def test_no_python_file_is_over_five_hundred_lines() -> None:
    long = [name for name, text in texts() if name.endswith(".py") and text.count("\n") > MOST_LINES]
    assert not long, f"over {MOST_LINES} lines, which is two ideas: {long}"


@pytest.mark.parametrize(
    ("what", "pattern"), [("a path of somebody's machine", MACHINE_PATHS), ("a package registry", REGISTRIES)]
)
def test_no_committed_file_names(what: str, pattern: re.Pattern[str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)
