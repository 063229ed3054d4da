"""The command trains, reports, warns, stops, and refuses with the way out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.forked import Forked
from support.runs import wait

from beit_dist.commands import tokenizer
from beit_dist.commands.training import parse
from beit_dist.config.reading import load_recipe
from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.resolve import resolve
from beit_dist.errors import ConfigError, TokenizerError
from beit_dist.weights.tokenizer_files import load_tokenizer
from corpus.writer import write_corpus

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "train_tokenizer.py")
TINY = [
    "precision=fp32",
    "model.vocabulary=64", "model.hidden=8", "model.blocks_per_group=1", "model.decoder_input=8",
    "view_size=32", "image_size=16", "global_batch=4", "held_out=3",
    "logging.metrics_port=null", "logging.every_steps=1",
]  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", images=10, size=32)
    return tmp_path / "corpus" / "images"


def run(*arguments: object) -> tuple[int, str]:
    """The command in a process of its own: it joins process groups, and ends its process when it fails."""
    return wait(Forked([TOOL, *map(str, arguments)], os.environ, ROOT))


@pytest.mark.slow
def test_it_stops_on_a_signal_goes_on_reports_and_says_that_it_is_done(tmp_path: Path, corpus: Path) -> None:
    """Plain Python, no launcher. The codebook of so short a training is a collapsed one, which is said."""
    out = tmp_path / "t.safetensors"
    arguments = ["--images", corpus, "--out", out, *TINY, "steps=300", "collapse.below=null"]
    process = subprocess.Popen(
        [sys.executable, TOOL, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "stopped on request: step" in text
    assert "Traceback" not in text
    assert (tmp_path / "t.run" / "PREEMPTED").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "t.run"]

    code, said = run(*arguments)
    assert code == 0, said
    assert "resumed from step-" in said
    assert load_tokenizer(out).digest[:16] in said
    assert "held out: PSNR" in said
    assert "of 64 in use, perplexity" in said
    assert "\nverdict: collapsed. " in said
    assert (tmp_path / "t.png").exists()
    assert json.loads((tmp_path / "t.run" / "DONE").read_text())["digest"] == load_tokenizer(out).digest

    code, said = run(*arguments)
    assert code == 0, said
    assert "already done" in said

    code, said = run(*arguments, "held_out=5")
    assert code == 2
    assert "cannot be continued: held_out was 3, now 5. Restore the settings" in said


@pytest.mark.slow
def test_a_collapse_fails_with_a_marker_and_without_a_file(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "t.safetensors"
    wrong = ["steps=1000", "kl_weight=1e4", "kl_warmup_steps=1", "optimizer.lr=0.05"]
    wrong += ["optimizer.warmup_steps=0", "collapse.for_steps=20"]
    code, said = run("--images", corpus, "--out", out, "--run", tmp_path / "r", *TINY, *wrong)
    assert code == 1
    assert "the codebook has collapsed" in said
    assert "usage_weight (0), a smaller kl_weight (10000)" in said
    assert "Traceback" not in said
    assert "the codebook has collapsed" in json.loads((tmp_path / "r" / "FAILED").read_text())["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "r"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=3"], "Did you mean steps?"),
        (["global_batch=none"], "global_batch: got 'none'"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--config", "nowhere.yaml"], "--config"),
        (["--ds_config", "nowhere.json"], "--ds_config"),
    ],
)
def test_it_refuses_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    out = tmp_path / "t.safetensors"
    with pytest.raises(ConfigError) as caught:
        tokenizer.main(["--images", str(tmp_path), "--out", str(out), *TINY, *arguments])
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(TokenizerError, match="got a folder"):
        tokenizer.main(["--images", "nowhere", "--out", str(tmp_path), *TINY])


def test_what_follows_a_dot_is_part_of_the_name(tmp_path: Path, monkeypatch: Any) -> None:
    """Two settings of a sweep have two runs and two pictures; only ``.safetensors`` is exchanged."""
    from beit_dist.engine import launch

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    jobs: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda task, resolved, ranks: jobs.append(task) or 0)
    names = [
        "dvae-kl0.1",
        "dvae-kl0.5",
        "dvae-kl0.5.safetensors.safetensors",
        "a.png",
        "a.run",
        "v1.2.safetensors",
    ]
    for name in names:
        tokenizer.main(["--images", "nowhere", "--out", str(tmp_path / name), *TINY])
    ends = ["dvae-kl0.1", "dvae-kl0.5", "dvae-kl0.5.safetensors", "a.png", "a.run", "v1.2"]
    assert [job.config.run for job in jobs] == [f"{tmp_path / name}.run" for name in ends]
    assert [job.output.picture for job in jobs] == [tmp_path / f"{name}.png" for name in ends]


@pytest.mark.parametrize("name", ["demo", "small", "dalle"])
def test_shipped_recipes_are_valid_and_divide_over_many_ranks(name: str) -> None:
    recipe = load_recipe(TokenizerConfig, ROOT / "configs" / f"tokenizer_{name}.yaml", ["run=r"])
    assert recipe.view_size == 112 or name == "dalle"
    for ranks in (1, 2, 4, 8, *((16, 64) if name == "dalle" else ())):
        resolved = resolve(recipe, None, ranks)
        assert resolved.micro_batch * resolved.accumulation * ranks == recipe.global_batch


@pytest.mark.parametrize("words", [["steps=5"], ["steps=5", "--out", "y", "steps=6"], ["--out", "y", "steps=5"]])
def test_settings_that_follow_several_sources_are_settings(words: list[str]) -> None:
    args = parse(tokenizer.parser(), ["--out", "x", "optimizer.lr=1", "--images", "split=train/", "b.tar", *words])
    assert args.images == ["split=train/", "b.tar"]
    assert args.overrides == ["optimizer.lr=1", *(word for word in words if "=" in word)]  # in their order
