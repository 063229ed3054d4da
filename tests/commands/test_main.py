"""``beit`` finds its commands, and each says first what it does and how it is typed."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beit_dist import __version__
from beit_dist.commands import check, train
from beit_dist.commands.main import COMMANDS, main
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIMS = {
    "bench": "bench",
    "check": "check_shards",
    "convert": "convert_dalle",
    "embed": "embed",
    "export": "export_checkpoint",
    "inspect": "inspect_shards",
    "plan": "plan_run",
    "pictures": "draw_pictures",
    "predict": "predict",
    "runs": "runs",
    "shards": "shard_tokens",
    "similar": "similar",
    "tokenizer": "train_tokenizer",
}


def parser_of(name: str) -> CommandParser:
    parser: CommandParser = importlib.import_module(COMMANDS[name]).parser()
    return parser


def python(*words: str) -> str:
    """What a Python without any installed package prints in the checkout."""
    command = [sys.executable, "-E", "-S", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_command_is_listed_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in shown
        assert parser_of(name).sentence in shown
    assert max(map(len, shown.splitlines())) < 80


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_has_the_sentence_then_examples_then_options_by_group(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    sentence, examples, *_ = shown.split("\n\n")
    assert re.fullmatch(r"[A-Z][^.]+\.", sentence)
    assert examples.startswith("examples:\n")
    assert f"  beit {name} " in shown
    assert shown.index("examples:") < shown.index(f"usage: beit {name}") < shown.index("\nwhat ")
    assert not any(line.startswith("positional") for line in shown.splitlines())
    assert max(map(len, shown.partition("usage:")[2].splitlines())) < 120
    assert max(map(len, shown.partition("usage:")[0].splitlines())) <= 90


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_command_lines_of_the_command(name: str) -> None:
    parser = parser_of(name)
    known = {option for action in parser._actions for option in action.option_strings}
    text = parser.examples.replace("\\\n", " ")
    calls = re.findall(rf"(?:beit|beit_dist) {name} (.*)", text)
    assert calls
    for words in calls:
        assert set(re.findall(r"(?<!\S)--[\w-]+", words)) <= known, words


def test_no_help_loads_what_takes_long() -> None:
    program = (
        "import importlib, json, sys\n"
        "from beit_dist.commands.main import COMMANDS, help_text\n"
        "help_text()\n"
        "for module in COMMANDS.values(): importlib.import_module(module).parser().format_help()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "deepspeed",
        "numpy",
        "matplotlib",
        "pydantic",
        "yaml",
        "webdataset",
        "fsspec",
        "PIL",
        "tqdm",
    }
    assert not heavy & set(json.loads(done.stdout))


@pytest.mark.parametrize(("name", "tool"), SHIMS.items())
def test_a_file_of_tools_is_the_command_and_runs_in_a_checkout_that_is_not_installed(name: str, tool: str) -> None:
    shown = python(f"tools/{tool}.py", "--help")
    assert shown.startswith(parser_of(name).sentence)
    assert f"usage: python tools/{tool}.py [-h]" in shown
    assert f"  python tools/{tool}.py " in shown
    assert "beit " not in shown.partition("usage:")[0]


@pytest.mark.parametrize(
    ("words", "alone", "launched"),
    [
        (["-m", "beit_dist", "train"], "python -m beit_dist train", "--module beit_dist train"),
        (["-m", "beit_dist.train"], "python -m beit_dist.train", "--module beit_dist.train"),
        (["beit_dist/train.py"], "python beit_dist/train.py", "beit_dist/train.py"),
    ],
)
def test_examples_are_spelt_as_the_command_was_started(words: list[str], alone: str, launched: str) -> None:
    shown = python(*words, "--help")
    assert f"\n  {alone} --config beit_small" in shown
    assert f"\n  deepspeed --num_gpus 8 {launched} --ds_config" in shown
    assert f"\nusage: {alone} [-h]" in shown


def test_the_version_is_printed() -> None:
    assert python("-m", "beit_dist", "--version") == f"beit_dist {__version__}\n"


def test_a_command_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"command: got 'trian', expected one of tokenizer, .*Did you mean train\?"
    ):
        main(["trian"])
    assert ConfigError.exit_code == 2


def test_without_a_command_the_list_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "commands:" in err


def test_the_rank_that_deepspeed_puts_before_the_command_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(train, "main", lambda words: handed.append(words) or 0)
    assert main(["--local_rank=1", "train", "--dry-run"]) == 0
    assert handed == [["--local_rank=1", "--dry-run"]]


def test_what_has_a_place_may_be_given_by_its_name_once(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["shards", "--limit", "3"], ["--limit", "3", "shards"], ["--data", "shards", "--limit", "3"]):
        assert vars(check.parser().parse(words)) == {"data": "shards", "storage": [], "threads": None, "limit": 3}
    for words, said in (([], "expected DIR or --data DIR"), (["a", "--data", "b"], "--data DIR, not both")):
        with pytest.raises(SystemExit) as ended:
            check.parser().parse(words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_an_option_means_the_same_in_every_command() -> None:
    """Others, such as ``--out``, say in each what they are of."""
    seen: dict[str, set[tuple[object, object]]] = {}
    for name in COMMANDS:
        for action in parser_of(name)._actions:
            for option in {"--images", "--sniff", "--device", "--json"} & {*action.option_strings}:
                assert action.help is not argparse.SUPPRESS
                seen.setdefault(option, set()).add((action.metavar, action.help))
    assert {option: len(kinds) for option, kinds in seen.items()} == dict.fromkeys(seen, 1)
    assert seen.keys() == {"--images", "--sniff", "--device", "--json"}
