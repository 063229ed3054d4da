"""What DeepSpeed really sends in a step, counted on two ranks, is what the plan says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import ROOT, Run

from beit_dist.commands.plan import stages, task_from
from beit_dist.engine.memory import count_parameters
from beit_dist.engine.resolve import resolve
from beit_dist.planning.communication import exchanges

COUNTING = """\
import collections
import json
import os
import sys

sys.path[:0] = {path}
import torch.distributed as dist

sent = collections.Counter()
WHOLE = {{  # where the whole tensor is among the arguments, and its name
    "all_reduce": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "broadcast": (0, "tensor"),
    "reduce_scatter_tensor": (1, "input"),
}}


def counting(name, place, argument):
    real = getattr(dist, name)

    def call(*arguments, **named):
        whole = arguments[place] if len(arguments) > place else named[argument]
        sent[name] += whole.numel() * whole.element_size()
        return real(*arguments, **named)

    setattr(dist, name, call)


for name, (place, argument) in WHOLE.items():
    counting(name, place, argument)
from beit_dist.commands.train import main
from beit_dist.engine.record import Recorder
from beit_dist.errors import exit_cleanly

add = Recorder.add


def noted(self, *arguments):
    if os.environ.get("RANK") == "0":
        print("SENT", json.dumps(sent), flush=True)
    sent.clear()
    return add(self, *arguments)


Recorder.add = noted
if __name__ == "__main__":
    exit_cleanly(main)
"""
"""``beit train`` that prints the payload of its collectives, by name, since the step before."""

KINDS = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "broadcast": "all-gather",  # of the parts of a tensor, one from each rank
    "reduce_scatter_tensor": "reduce-scatter",
}
SMALL = 2_000
"""Bytes of a step's other exchanges: agreements, the norm of the gradients."""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_a_step_exchanges_what_the_plan_says(
    stage: int, precision: str, new_run: Callable[..., Run], tmp_path: Path
) -> None:
    settings = [f"precision={precision}", "steps=3", "optimizer.warmup_steps=1", "loader.workers=0"]
    ds_config = stages()[stage]
    if stage == 3:  # or all parameters of a model so small stay whole
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    run = new_run("run", ds=ds_config, overrides=settings, forked=False)
    run.entry = tmp_path / "counting.py"
    run.entry.write_text(COUNTING.format(path=[str(ROOT)]))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*run.command("logging.progress=false"), "--ranks", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = [json.loads(line) for line in re.findall(r"SENT (.*)", done.stdout)]
    assert len(counted) == 3
    task = task_from("pretraining", str(run.recipe), [*settings, f"run={run.folder}"])
    resolved = resolve(task.config, ds_config, 2)
    assert resolved.accumulation == 2
    for each in exchanges(resolved, count_parameters(task), cpu=True):
        found = sum(counted[-1].get(name, 0) for name, kind in KINDS.items() if kind == each.kind)
        planned = each.payload * each.times
        assert abs(found - planned) <= SMALL
