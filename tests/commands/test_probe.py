"""``beit probe`` prints what each layer is worth, and refuses what it cannot answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.classes import write_classes

from beit_dist.commands.probe import main
from beit_dist.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two layers, stopped at step 6."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(ROOT / "tests/engine/old_runs/first", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data"))


def test_it_prints_each_layer_and_the_best_beside_the_commonest_class(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--data", str(data), "--device", "cpu", "--json", str(tmp_path / "probe.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"model   {run}, step-00000006.a0001"
    assert shown[1] == "images  29 to fit to, 6 of them to choose on; 7 to test on; 3 classes"
    assert shown[2] == f"layers  1, 2: 9.0 KiB of features in {run}/probe"
    assert [line.split()[0] for line in shown[3:6]] == ["layer", "1", "2"]
    facts = json.loads((tmp_path / "probe.json").read_text())
    assert [layer["layer"] for layer in facts["layers"]] == [1, 2]
    best = facts["linear"]
    assert shown[6] == f"linear  {best['accuracy']:.1%} of the test images, with layer {best['layer']}"
    assert shown[8] == "commonest class 42.9%"
    assert best["accuracy"] > 0.8
    assert list((run / "probe").iterdir()) == []  # features are not kept once all is known


def test_json_alone_and_a_choice_of_layers(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--layers", "2", "--samples", "20", "--device", "cpu", "--json", "-"]
    assert main([str(run), "--data", str(data), *chosen]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in facts["layers"]] == [2]
    assert sum(facts["images"].values()) == 20


def test_what_cannot_be_answered_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    step = str(next((run / "checkpoints").glob("step-*")))
    for words, said in (
        ([str(run)], "--data: got None"),
        ([str(run), "--data", str(data), "--layers", "3"], "--layers: got 3"),
        ([str(run), "--data", str(data), "--layers", "last"], "--layers: got 'last'"),
        ([step, "--data", str(data)], "--out: got None, expected a folder for the features, as no run folder"),
        ([str(run), "--data", str(data), "--test", str(data)], "--test: got .*images that are not in --data"),
    ):
        with pytest.raises(ConfigError, match=said):
            main(words)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        main([str(run), "--data", str(data), "--ema"])
    assert main([step, "--data", str(data), "--out", str(tmp_path), "--device", "cpu"]) == 0


@pytest.mark.slow
def test_two_ranks_find_what_one_does(run: Path, data: Path, tmp_path: Path) -> None:
    words = [str(run), "--data", str(data), "--batch", "1"]
    assert main([*words, "--device", "cpu", "--json", str(tmp_path / "one.json")]) == 0
    command = [sys.executable, "-m", "beit_dist", "probe", *words, "--ranks", "2", "--json", "two.json"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())
