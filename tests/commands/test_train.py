"""``beit train`` takes settings by flags as by ``key=value``, and files by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ports import free_ports
from support.runs import Run

from beit_dist.commands import train
from beit_dist.commands.training import as_ranks, parse
from beit_dist.config import recipes
from beit_dist.config.recipes import KINDS, named, shipped
from beit_dist.engine import refusal
from beit_dist.errors import ConfigError
from beit_dist.shards.manifest import Manifest

ROOT = Path(__file__).parents[2]
SMALL = ["model.image_size=32", "model.patch_size=8", "model.vocabulary=64", "masking.min_block=4"]
SMALL += ["masking.masked_patches=6", "global_batch=8", "micro_batch=8", "steps=9", "optimizer.warmup_epochs=null"]


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # What other programs write meanwhile changes it, and the outputs are compared.
    monkeypatch.setattr(refusal, "free_space", lambda folder: 100 * 2**30)

    def run(*words: str) -> str:
        assert train.main(["--config", "beit_tiny", "--dry-run", *words]) == 0
        return capsys.readouterr().out

    return run


def test_a_flag_is_the_setting_of_its_name(
    tmp_path: Path, make_shards: Callable[..., Manifest], dry_run: Callable[..., str]
) -> None:
    make_shards(tmp_path / "d")
    by_flags = dry_run(
        *("--run", str(tmp_path / "r"), "--data", str(tmp_path / "d"), "--precision", "fp32"),
        *("--storage", "retry_seconds=7", *SMALL),
    )
    by_keys = dry_run(
        *(f"run={tmp_path / 'r'}", f"data={tmp_path / 'd'}", "precision=fp32", "storage.retry_seconds=7", *SMALL)
    )
    assert by_flags == by_keys
    assert str(tmp_path / "d") in by_flags
    assert "precision   fp32" in by_flags
    assert list(tmp_path.iterdir()) == [tmp_path / "d"]


def test_without_a_ds_config_it_is_zero1(dry_run: Callable[..., str]) -> None:
    alone = dry_run("run=r", "precision=fp32")
    assert alone == dry_run("run=r", "precision=fp32", "--ds_config", "zero1")
    assert "ZeRO stage 1" in alone
    assert "ZeRO stage 0" in dry_run("run=r", "precision=fp32", "--ds_config", "zero0")


def test_settings_keep_their_order_wherever_they_stand() -> None:
    words = ["a=1", "--storage", "retry_seconds=7", "b=2", "--dry-run", "c=3", "--config", "x", "a=4"]
    args = parse(train.parser(), words)
    assert args.overrides == ["storage.retry_seconds=7", "a=1", "b=2", "c=3", "a=4"]
    assert (args.config, args.dry_run) == ("x", True)


def test_every_shipped_file_is_found_by_its_name() -> None:
    for kind in KINDS:
        assert shipped(kind)
        for name, path in shipped(kind).items():
            assert named(kind, name) == path
    files = {path.resolve() for kind in KINDS for path in shipped(kind).values()}
    assert files == {*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "deepspeed").glob("*.json")}


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("pretraining", "beit_smal", r"--config: got 'beit_smal', .*beit_small, .*Did you mean beit_small\?"),
        ("pretraining", "configs/beit_base.yml", r"--config: .*Did you mean beit_base\?"),
        ("pretraining", "tokenizer_demo", r"the name of a recipe: beit_base, "),
        ("tokenizer", "tokenizer_smal", r"Did you mean tokenizer_small\?"),
        ("deepspeed", "zero", r"--ds_config: got 'zero', .*a DeepSpeed file: zero0, zero1, zero2, zero3"),
    ],
)
def test_a_name_of_nothing_is_refused_with_the_nearest(
    kind: str, given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        named(kind, given)


def test_a_file_of_the_current_folder_wins_as_a_path_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("beit_small", "beit_small.yaml", "mine"):
        Path(name).write_text("steps: 3")
    assert named("pretraining", "beit_small") == recipes.FOLDER / "beit_small.yaml"
    assert named("pretraining", "./beit_small") == Path("beit_small")
    assert named("pretraining", "beit_small.yaml") == Path("beit_small.yaml")
    with pytest.raises(ConfigError, match=r"For the file in this folder write \./mine\."):
        named("pretraining", "mine")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "places"),
    [
        (["deepspeed", "--num_accelerators", "2", "--master_port"], ["--run", "RUN", "--data", "DATA"]),
        (["torchrun", "--nproc-per-node", "2", "--master-port"], ["run=RUN", "data=DATA"]),
    ],
    ids=["deepspeed", "torchrun"],
)
def test_launchers_start_it_as_a_module(
    new_run: Callable[..., Run], launcher: list[str], places: list[str]
) -> None:
    run = new_run("run", forked=False)
    program = str(Path(sys.executable).with_name(launcher[0]))
    command = [program, *launcher[1:], str(free_ports(1)[0]), "--module", "beit_dist", "train"]
    command += ["--config", str(run.recipe)]
    command += [word.replace("RUN", str(run.folder)).replace("DATA", str(run.data)) for word in places]
    run.command = lambda *overrides: [*command, *overrides]  # type: ignore[method-assign]
    code, output = run.finish("steps=3", "optimizer.warmup_steps=1")
    assert code == 0, output
    assert [line["step"] for line in run.lines()] == [1, 2, 3]
    assert [place["rank"] for place in run.facts()["ranks"]] == [0, 1]


def test_on_a_terminal_the_wait_for_imports_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parse(train.parser(), ["--dry-run"])
    assert as_ranks(args, lambda ranks: 0) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert as_ranks(args, lambda ranks: 0) == 0
    assert "loading PyTorch" in capsys.readouterr().err
