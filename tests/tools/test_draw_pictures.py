"""The pictures of a run, from its folder, its shards and its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.image import imread

from beit_dist.config import DVAEConfig, TrainConfig, validate
from beit_dist.data.shards import Manifest
from beit_dist.errors import ConfigError, DataError, TokenizerError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.visual_tokens.dvae import DVAE
from beit_dist.visual_tokens.weights import save_tokenizer

STEP = "checkpoints/step-00000002.a0001"


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("draw_pictures")


@pytest.fixture
def run(tmp_path: Path, tool: Any, monkeypatch: pytest.MonkeyPatch, make_shards: Callable[..., Manifest]) -> Path:
    """A run folder with two steps, shards, a tokenizer, and a checkpoint that needs no engine to be written."""
    sizes = {"width": 16, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8, "vocabulary": 64}
    recipe = {"run": str(tmp_path / "run"), "data": str(tmp_path / "data"), "model": sizes}
    config = validate(TrainConfig, recipe | {"masking": {"masked_patches": 6, "min_block": 4}})
    model = MaskedImageModel(config.model)
    model.initialise(0)
    monkeypatch.setattr(tool, "load_weights", lambda path: (model.state_dict(), config, {"step": 2}))

    tokenizer_config = DVAEConfig(vocabulary=64, hidden=8, blocks_per_group=1, decoder_input=8)
    digest = save_tokenizer(tmp_path / "dvae.safetensors", DVAE(tokenizer_config), tokenizer_config)
    manifest = make_shards(tmp_path / "data")
    changed = Manifest(manifest.layout, digest, manifest.views, manifest.write_seed, 0, manifest.shards)
    (tmp_path / "data" / "manifest.json").write_bytes(changed.to_bytes())

    folder = tmp_path / "run"
    (folder / STEP).mkdir(parents=True)
    (folder / STEP / "manifest.json").write_text("{}")
    lines = [{"step": step, "loss": 4.2, "accuracy": 0.02, "attempt": 1} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def draw(tool: Any, run: Path, *options: str) -> int:
    code: int = tool.main([str(run), "--tokenizer", str(run.parent / "dvae.safetensors"), *options])
    return code


def test_both_pictures_are_written_into_the_run(tool: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(tool, run, "--samples", "2") == 0
    said = capsys.readouterr().out
    for name in ("loss.png", "panel.png"):
        assert imread(run / "pictures" / name).ndim == 3
        assert str(run / "pictures" / name) in said


def test_a_step_folder_and_other_places_are_accepted(tool: Any, run: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "data", tmp_path / "moved")
    out = tmp_path / "elsewhere"
    options = ("--samples", "1", "--data", str(tmp_path / "moved"), "--out", str(out))
    assert draw(tool, run / STEP, "--tokenizer", str(tmp_path / "dvae.safetensors"), *options) == 0
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "panel.png"]
    assert not (run / "pictures").exists()


def test_what_a_user_gets_wrong_is_named(tool: Any, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--samples"):
        draw(tool, run, "--samples", "0")
    with pytest.raises(DataError, match=r"manifest\.json"):
        draw(tool, run, "--data", str(tmp_path / "nowhere"))
    with pytest.raises(TokenizerError, match=r"other\.safetensors"):
        draw(tool, run, "--tokenizer", str(tmp_path / "other.safetensors"))
