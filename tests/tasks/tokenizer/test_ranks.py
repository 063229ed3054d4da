"""Two ranks under the real launcher: stopped and resumed to the last bit; continued by one rank."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.forked import Forked
from support.ports import free_ports
from support.tokenizers import TINY, Training

from beit_dist.weights.tokenizer_files import load_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
SETTINGS = {
    "precision": "fp32",
    "steps": 24,
    "micro_batch": 1,
    "validation": {"every_steps": 10},
    "usage_weight": 20.0,
}
SETTINGS |= {"logging": TINY["logging"] | {"every_steps": 1}}


def start(out: Path, images: Path, *, deepspeed: bool = False) -> Any:
    """Two ranks with the shipped DeepSpeed file; by its launcher, as docs/tokenizers.md has it, or sooner."""
    (port,) = free_ports(1)
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(TINY | SETTINGS))
    words = [str(ROOT / "tools" / "train_tokenizer.py"), "--images", str(images), "--out", str(out)]
    words += ["--ds_config", str(ROOT / "configs" / "deepspeed" / "zero1.json"), "--config", str(recipe)]
    if not deepspeed:
        return Forked(words, os.environ, out.parent, ranks=2, port=port)
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return subprocess.Popen(
        [launcher, "--num_accelerators", "2", "--master_port", str(port), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )


def finish(process: Any) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"training did not end: {output[-3000:]}")
    return process.returncode, output


def test_two_ranks_stopped_and_resumed_equal_two_that_never_stopped_and_one_rank_can_go_on(
    tmp_path: Path, images: Path, training: Any
) -> None:
    whole, cut = (Training(tmp_path / f"{name}.safetensors", images, None) for name in ("whole", "cut"))
    code, output = finish(start(whole.out, images, deepspeed=True))
    assert code == 0, output
    assert re.search(r"^data +.*: 9 images$", output, re.MULTILINE)
    assert re.search(r"^held out +3 images", output, re.MULTILINE)

    process = start(cut.out, images)
    deadline = time.monotonic() + 200
    while not ((cut.run / "metrics.jsonl").exists() and len(cut.lines()) >= 5):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"no step 5: {finish(process)}")
        time.sleep(0.02)
    ranks = json.loads((cut.run / "run.json").read_text())["ranks"]
    os.kill(ranks[1]["pid"], signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    stopped = json.loads((cut.run / "PREEMPTED").read_text())
    assert 5 <= stopped["step"] < 24
    assert stopped["reason"] == "SIGTERM"
    assert len(cut.lines()) == stopped["step"]
    assert not cut.out.exists()
    alone = training("alone", **SETTINGS)
    shutil.copytree(cut.run, alone.run)

    code, output = finish(start(cut.out, images))
    assert code == 0, output
    assert f"resumed from step-{stopped['step']:08d}" in output
    assert cut.lines() == whole.lines()
    assert cut.lines("validation.jsonl") == whole.lines("validation.jsonl")
    assert cut.state() == whole.state()
    assert load_tokenizer(cut.out).digest == load_tokenizer(whole.out).digest

    assert alone.start(ds={"zero_optimization": {"stage": 0}}) == "DONE"
    for name in ("loss", "kl", "usage_kl", "perplexity"):
        got, expected = ([line[name] for line in run.lines()] for run in (alone, whole))
        assert got[: stopped["step"]] == expected[: stopped["step"]]
        assert got == pytest.approx(expected, rel=0.05, abs=0.02), name
