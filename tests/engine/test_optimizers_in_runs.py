"""Runs of two ranks with each optimizer but AdamW, which the other tests have: killed, moved, exported."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from beit_dist.weights.stored import load_weights

pytestmark = pytest.mark.slow

KEPT = {"lion": {"exp_avg"}, "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq"}}


def settings(optimizer: str) -> list[str]:
    # A schedule that does not depend on the number of steps.
    constant = ["optimizer.lr=1e-3", "optimizer.min_lr=1e-3", "optimizer.warmup_steps=0"]
    return [f"optimizer.name={optimizer}", *constant, "loader.workers=0"]


def manifest(folder: Path, step: int) -> dict[str, Any]:
    (found,) = folder.glob(f"checkpoints/step-{step:08d}.*")
    read: dict[str, Any] = json.loads((found / "manifest.json").read_text())
    return read


@pytest.mark.parametrize(("optimizer", "stage"), [("lion", 1), ("lion", 3), ("muon", 0)])
def test_a_killed_run_ends_as_if_nothing_had_happened(
    new_run: Callable[..., Any], optimizer: str, stage: int
) -> None:
    whole, killed = (
        new_run(name, f"zero{stage}.json", ranks=2, overrides=[*settings(optimizer), "steps=28"])
        for name in ("whole", "killed")
    )
    code, output = whole.finish()
    assert code == 0, output
    assert "untested" not in output
    # The save of step 14 has begun, so that of step 7 is whole, however slow the disk is.
    assert killed.signal_at(15, signal.SIGKILL, rank=None)[0] != 0
    code, output = killed.finish()
    assert code == 0, output
    assert "resumed from step-" in output
    assert killed.numbers() == whole.numbers()
    assert killed.final_files() == whole.final_files()
    assert set(manifest(killed.folder, 28)["state_digests"]) == {"weight", *KEPT[optimizer]}

    if stage == 1:  # the others would be refused alike
        code, output = killed.finish("optimizer.name=adamw")
        assert code == 2
        assert f"cannot be continued: optimizer.name was '{optimizer}', now 'adamw'" in output

    weights, config, _ = load_weights(killed.folder)
    assert config.optimizer.name == optimizer
    files = [load_file(path) for path in sorted(killed.folder.glob("checkpoints/step-00000028.*/*.safetensors"))]
    pieces = {key: value for file in files for key, value in file.items()}
    for name, values in weights.items():
        found = [key for key in pieces if key.rpartition("@")[0] == f"weight/{name}"]
        found.sort(key=lambda key: int(key.rpartition("@")[2]))
        assert torch.equal(values.view(-1), torch.cat([pieces[key] for key in found])), name


def test_lions_state_moves_to_other_stages_and_numbers_of_ranks(new_run: Callable[..., Any]) -> None:
    """That each restore is exact is proved by the digests of the state, without which a start fails."""
    whole = new_run("whole", "zero1.json", ranks=2, overrides=settings("lion"))
    code, output = whole.finish("steps=28")
    assert code == 0, output
    begun = new_run("moved", "zero1.json", ranks=2)
    shutil.copytree(whole.folder, begun.folder)
    for folder in begun.folder.glob("checkpoints/step-*"):
        if folder.name != "step-00000021.a0001":
            shutil.rmtree(folder)
    for stage, ranks, steps in ((3, 1, 23), (2, 2, 25), (0, 1, 27), (1, 1, 28)):
        run = new_run("moved", f"zero{stage}.json", ranks=ranks, overrides=[*settings("lion"), f"steps={steps}"])
        code, output = run.finish()
        assert code == 0, output
        saved = manifest(run.folder, steps)
        assert (saved["stage"], saved["world_size"], saved["resumed_from"] is None) == (stage, ranks, False)
    assert [line["batch"] for line in run.lines()] == [line["batch"] for line in whole.lines()]
    losses = [line["loss"] for line in whole.lines()]
    assert [line["loss"] for line in run.lines()] == pytest.approx(losses, rel=0.01)
