"""What pre-training has, a tokenizer's training has too: dry run, traces, stragglers, optimizers and so on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.forked import Forked
from support.ports import free_ports
from support.runs import wait
from support.tokenizers import TINY

from beit_dist.commands import tokenizer as command
from beit_dist.errors import ConfigError, TrainingError
from beit_dist.tasks.tokenizer import task as tokenizer

ROOT = Path(__file__).parents[3]
Make = Callable[..., Any]


def test_the_dry_run_tells_sizes_work_memory_and_images_and_starts_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY | {"precision": "fp32", "steps": 40}))
    given = [
        "--images",
        str(images),
        "--out",
        str(tmp_path / "t.safetensors"),
        "--config",
        str(tmp_path / "r.yaml"),
    ]
    assert command.main([*given, "--dry-run", "--ranks", "2"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert rows["run"] == f"{tmp_path / 't.run'}, which can be written to"
    assert rows["batch"] == "4 = 2 ranks × 1 micro-batch of 2"
    assert rows["data"].endswith("12 images, 3 of them held out")
    assert rows["epoch"] == "2.2 steps of 4 images"
    assert rows["steps"] == "40, or 17.78 epochs"
    assert rows["parameters"] == "41,786"
    assert rows["optimizer"].startswith("adamw, which keeps exp_avg of 41,786,")
    assert "average" in rows["memory"]
    assert not (tmp_path / "t.run").exists()


def test_the_work_of_a_convolution_is_counted() -> None:
    config = tokenizer.TokenizerConfig(run="r", model={"vocabulary": 8, "hidden": 4, "decoder_input": 4})
    task = tokenizer.TokenizerTraining(config, Path("t.safetensors"))
    half = config.model_copy(update={"image_size": 56})
    other = tokenizer.TokenizerTraining(half, Path("t.safetensors"))
    assert task.multiply_adds == 4 * other.multiply_adds  # a quarter of the pixels
    first = 112 * 112 * 7 * 7 * 3 * 4  # the encoder's first convolution alone
    assert first < task.multiply_adds < 100 * first


def test_a_spike_stops_the_training(training: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tokenizer.elbo

    def spiky(*arguments: Any) -> Any:
        terms = original(*arguments)
        step = trained.run.joinpath("metrics.jsonl").read_text().count("\n")
        return terms._replace(loss=terms.loss + (1e4 if step >= 12 else 0))

    monkeypatch.setattr(tokenizer, "elbo", spiky)
    logging = TINY["logging"] | {"every_steps": 1}
    guard = {"spikes": "stop", "window": 8, "threshold": 50.0}
    trained = training("t", steps=40, guard=guard, logging=logging)
    with pytest.raises(TrainingError, match=r"step \d+ has a loss of .*Start again from an earlier checkpoint"):
        trained.start()
    assert not trained.out.exists()


def test_a_trace_is_written_and_the_kind_is_told_everywhere(training: Make) -> None:
    trained = training("t", profile={"start_step": 2, "steps": 1})
    assert trained.start() == "DONE"
    assert (trained.run / "ranks" / "rank-00000.trace.json").stat().st_size > 0
    manifests = sorted((trained.run / "checkpoints").glob("step-*/manifest.json"))
    assert {json.loads(path.read_text())["kind"] for path in manifests} == {"tokenizer"}
    assert trained.facts()["kind"] == "tokenizer"


def test_lion_trains_it_too_and_muon_is_refused(training: Make) -> None:
    trained = training("t", optimizer={"name": "lion", "lr": 1e-4})
    assert trained.start() == "DONE"
    assert set(trained.state()[1]) == {"weight", "exp_avg", "ema"}
    from beit_dist.engine.optimizers.table import check_model

    task = tokenizer.TokenizerTraining(trained.config(optimizer={"name": "muon"}), trained.out)
    with pytest.raises(ConfigError, match="no matrices in blocks"):
        check_model(task.config.optimizer, {name: p.shape for name, p in task.network().named_parameters()})


def test_deterministic_and_compiled_trainings_end_and_say_what_is_compiled(
    training: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from beit_dist.engine import task as engine_task
    from beit_dist.engine.compiled import compile_blocks

    torch._dynamo.reset()
    monkeypatch.setattr(engine_task, "compile_blocks", lambda model: compile_blocks(model, "eager"))
    plain, compiled = training("plain", steps=2), training("compiled", steps=2, compile=True, deterministic=True)
    assert plain.start() == compiled.start() == "DONE"
    assert "compile: 8 of 8 blocks run compiled" in capsys.readouterr().out
    for one, other in zip(plain.lines(), compiled.lines(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_rank_that_computes_slowly_is_named_though_the_others_wait_for_it_in_the_usage_term(
    tmp_path: Path, images: Path
) -> None:
    """Rank 1 needs 0.15 s more in each forward pass, at whose end the ranks exchange their tokens' use."""
    entry, recipe = tmp_path / "slow.py", tmp_path / "r.yaml"
    entry.write_text(
        "import os, runpy, time\n"
        "from beit_dist.models.dvae import DVAE\n"
        "forward = DVAE.forward\n"
        "def slow(self, *inputs, **named):\n"
        "    time.sleep(0.15 if os.environ['RANK'] == '1' else 0)\n"
        "    return forward(self, *inputs, **named)\n"
        "DVAE.forward = slow\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'train_tokenizer.py')!r}, run_name='__main__')\n"
    )
    logging = {"metrics_port": None, "every_steps": 4}
    settings = {"precision": "fp32", "steps": 13, "logging": logging, "validation": {"every_steps": 13}}
    recipe.write_text(yaml.safe_dump(TINY | settings))
    (port,) = free_ports(1)
    words = [entry, "--images", images, "--out", tmp_path / "t.safetensors", "--config", recipe]
    code, output = wait(Forked([*map(str, words)], os.environ, tmp_path, ranks=2, port=port))
    assert code == 0, output
    assert output.count("holds up the others") == 1
    assert "rank 1 on " in output
