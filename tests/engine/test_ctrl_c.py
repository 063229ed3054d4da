"""Ctrl-C at every stage of a run: one line at once, no traceback, and the prompt after the last rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.terminal import Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"
# A stage begins, and waits there until the rank was asked to stop.
WAITING = """\
import os, pathlib, runpy, time
from beit_dist.engine.ranks.preemption import StopRequest
rank, install = os.environ.get("RANK", "0"), StopRequest.install
def installing(self):
    globals()["stop"] = self
    return install(self)
StopRequest.install = installing
def waiting(owner, name, when=lambda *_: True):
    known = getattr(owner, name)
    def instead(*given):
        if when(*given):
            pathlib.Path(f"at-{rank}").touch()
            while stop.name is None: time.sleep(0.01)
        return known(*given)
    setattr(owner, name, instead)
"""
DATA = "from beit_dist.tasks.pretraining.task import Pretraining\n"
LOADER = "from beit_dist.stream.batches import RankBatches\n"
STAGES = {
    "joining": "from beit_dist.engine import launch\nwaiting(launch, 'join')",
    "looking at the data": DATA + "waiting(Pretraining, 'prepare')",
    "starting the loader": LOADER + "waiting(RankBatches, '_open_loader')",
    "training": "from beit_dist.engine.trainer import Trainer\n"
    "waiting(Trainer, '_train_step', lambda trainer, *_: trainer.progress.step == 6)",
    "measuring": "from beit_dist.tasks.pretraining.validation import Validation\nwaiting(Validation, 'measure')",
    "saving": "from beit_dist.engine.checkpoint import writing\nwaiting(writing, 'write_fragments')",
}
SAID = {
    "training": "SIGINT: stopping after step 7 or 8 of 400 and saving a checkpoint. Press Ctrl-C again after 5 s",
    "measuring": "SIGINT: stopping after step 5, without what is being measured, and saving a checkpoint.",
    "saving": "SIGINT: stopping after step ",
}


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [*((stage, 2) for stage in STAGES), ("joining", 1), ("training", 1)],
)
def test_ctrl_c_is_acknowledged_once_and_leaves_a_run_that_can_be_continued(
    new_run: Callable[..., Any],
    make_shards: Callable[..., Any],
    tmp_path: Path,
    stage: str,
    ranks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    make_shards(tmp_path / "held_out", [20], seed=3)
    workers = int(stage in ("starting the loader", "training"))  # each of which imports what a rank does
    settings = ["steps=400", f"loader.workers={workers}", "validation.every_steps=5"]
    settings += [f"validation.data={tmp_path / 'held_out'}"]
    run = new_run("run", overrides=settings)
    run.entry = tmp_path / "entry.py"
    alone = "ranks" if ranks == 1 else "ranks and 'RANK' in os.environ"
    run.entry.write_text(
        f"import os\nranks = {ranks}\nif __name__ == '__main__' and {alone}:\n"
        + "".join(f"    {line}\n" for line in (WAITING + STAGES[stage]).splitlines())
        + f"import runpy\nrunpy.run_path({str(TRAIN)!r}, run_name=__name__)\n"
    )
    command = run.command() if ranks == 1 else [*run.command(), "--ranks", str(ranks)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with Terminal([sys.executable, *command[1:]], cwd=tmp_path, env=environment) as terminal:
        terminal.until(lambda: all((tmp_path / f"at-{rank}").exists() for rank in range(ranks)), 400)
        terminal.ctrl_c()
        code = terminal.end(240)
        shown = terminal.shown
    assert code == 0, shown
    assert "Traceback" not in shown
    assert shown.count("SIGINT: ") == 1, shown
    assert SAID.get(stage, "SIGINT: stopping before the first step. Press Ctrl-C again after 5 s to stop") in shown
    stopped = json.loads((run.folder / "PREEMPTED").read_text())
    assert stopped["reason"] == "SIGINT"
    assert not (run.folder / "FAILED").exists()
    assert shown.rstrip().endswith(f"run folder {run.folder}. To continue, give the same command again.")
    saved = list(run.folder.glob(f"checkpoints/step-{stopped['step']:08d}.*/manifest.json"))
    assert len(saved) == (stage not in ("joining", "looking at the data"))
