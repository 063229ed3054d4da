"""The command trains, reports, warns, and refuses with the way out."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from beit_dist.config import TokenizerRecipe, load_recipe
from beit_dist.data.corpus.writer import write_corpus
from beit_dist.visual_tokens.weights import load_tokenizer

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "train_tokenizer.py")
TINY = [
    "model.vocabulary=64", "model.hidden=8", "model.blocks_per_group=1", "model.decoder_input=8",
    "view_size=32", "image_size=16", "batch=4", "held_out=3",
]  # fmt: skip


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(TOOL, run_name="__main__")
    signal.signal(signal.SIGTERM, before)
    return end.value.code


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus", images=10, size=32)
    return tmp_path / "corpus" / "images"


def test_trains_and_reports_quality(tmp_path, corpus, monkeypatch, capsys):
    out = tmp_path / "t.safetensors"
    assert run(monkeypatch, "--images", corpus, "--out", out, *TINY, "steps=3") == 0
    text = capsys.readouterr().out
    assert load_tokenizer(out).digest[:16] in text
    assert "held-out PSNR" in text
    assert "of 64, perplexity" in text
    assert (tmp_path / "t.png").exists()


def test_warns_of_a_collapsed_codebook(tmp_path, corpus, monkeypatch, capsys):
    out = tmp_path / "t.safetensors"
    assert run(monkeypatch, "--images", corpus, "--out", out, *TINY, "steps=1", "model.vocabulary=4096") == 0
    assert "COLLAPSED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=3"], "Did you mean steps?"),
        (["batch=none"], "error: batch"),
        (["--device", "tpu"], "error: --device: got 'tpu'"),
        (["--config", "nowhere.yaml"], "error: --config"),
        (["held_out=64"], "got 10 usable images, expected at least 65"),
    ],
)
def test_refuses_at_start(tmp_path, corpus, monkeypatch, capsys, arguments, message):
    out = tmp_path / "t.safetensors"
    assert run(monkeypatch, "--images", corpus, "--out", out, *TINY, *arguments) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured
    assert not out.exists()


@pytest.mark.parametrize("name", ["demo", "small", "dalle"])
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(TokenizerRecipe, ROOT / "configs" / f"tokenizer_{name}.yaml")
    assert recipe.view_size == 112 or name == "dalle"


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_without_a_file_or_a_traceback(tmp_path, corpus, signal_number):
    out = tmp_path / "t.safetensors"
    command = [sys.executable, TOOL, "--images", corpus, "--out", out, *TINY, "steps=1000000"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]
