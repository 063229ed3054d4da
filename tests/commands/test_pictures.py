"""The pictures of a run, from its folder, its shards and its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread
from support.figures import words_of

from beit_dist.commands import inspect as command_inspect
from beit_dist.commands import pictures
from beit_dist.config.dvae import DVAEConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import validate
from beit_dist.errors import ConfigError, DataError, TokenizerError
from beit_dist.models.dvae import DVAE
from beit_dist.models.mim import MaskedImageModel
from beit_dist.reports import drawing, sources
from beit_dist.shards.manifest import Manifest, load_manifest
from beit_dist.shards.statistics import load_statistics
from beit_dist.storage.access import Access
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.weights.tokenizer_files import save_tokenizer

STEP = "checkpoints/step-00000002.a0001"


@pytest.fixture
def target() -> str:
    return "tokens"


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shards: Callable[..., Manifest], target: str
) -> Path:
    """A run folder with two steps, shards, a tokenizer, and a checkpoint that needs no engine to be written."""
    sizes: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8}
    sizes |= {"vocabulary": 64, "target": target}
    recipe = {"run": str(tmp_path / "run"), "data": str(tmp_path / "data"), "model": sizes}
    config = validate(PretrainingConfig, recipe | {"masking": {"masked_patches": 6, "min_block": 4}})
    model = MaskedImageModel(config.model)
    model.initialise(0)
    tokenizer_config = DVAEConfig(vocabulary=64, hidden=8, blocks_per_group=1, decoder_input=8)
    digest = save_tokenizer(tmp_path / "dvae.safetensors", DVAE(tokenizer_config), tokenizer_config)
    manifest = make_shards(tmp_path / "data")
    changed = Manifest(manifest.layout, digest, manifest.views, manifest.write_seed, 0, manifest.shards)
    (tmp_path / "data" / "manifest.json").write_bytes(changed.to_bytes())

    facts = {"step": 2, "attempt": 1, "dataset": changed.digest}

    def opened(place: str, *, ema: bool, access: Access) -> Weights:
        return Weights(model, config, facts, ema, access)

    monkeypatch.setattr(drawing, "open_weights", opened)

    folder = tmp_path / "run"
    (folder / STEP).mkdir(parents=True)
    (folder / STEP / "manifest.json").write_text(json.dumps(facts))
    (folder / "run.json").write_text(json.dumps({"kind": "pretraining"}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    lines = [{"step": step, "loss": 4.2, "accuracy": 0.02, "attempt": 1} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Weights:
    """Stands for a checkpoint that needs no engine to be written."""

    def __init__(
        self, model: MaskedImageModel, config: PretrainingConfig, facts: dict[str, Any], ema: bool, access: Access
    ) -> None:
        self.config, self.saved, self._state = config, SimpleNamespace(manifest=facts), model.state_dict()
        self.shapes = {name: list(value.shape) for name, value in self._state.items()}
        averages.append(ema)
        accesses.append(access)

    def read(self, name: str) -> torch.Tensor:
        return self._state[name]


averages: list[bool] = []
"""Whether averaged weights were asked for, each time."""
accesses: list[Access] = []
"""How they were to be reached."""


def hold_out(run: Path, into: Path) -> Path:
    """A data set of images that the run is not trained on, made with its tokenizer."""
    manifest = load_manifest(run.parent / "data")
    shutil.copytree(run.parent / "data", into, ignore=shutil.ignore_patterns(into.name))
    changed = Manifest(manifest.layout, manifest.tokenizer, manifest.views, 7, 0, manifest.shards)
    (into / "manifest.json").write_bytes(changed.to_bytes())
    return into


def draw(run: Path, *options: str) -> int:
    code: int = pictures.main([str(run), "--tokenizer", str(run.parent / "dvae.safetensors"), *options])
    return code


def test_both_pictures_are_written_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(run, "--samples", "2") == 0
    said = capsys.readouterr().out
    for name in ("loss.png", "panel.png"):
        assert imread(run / "pictures" / name).ndim == 3
        assert str(run / "pictures" / name) in said


def test_run_weights_and_data_are_reached_as_storage_says(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(where: Any, access: Access | None = None) -> Any:
        accesses.append(access or Access())
        return open_place(where, access)

    for module in (drawing, sources):
        monkeypatch.setattr(module, "open_place", opened)
    accesses.clear()
    tokenizer = ("--tokenizer", str(run.parent / "dvae.safetensors"))
    assert pictures.main([str(run), *tokenizer, "--storage", "options.s3.endpoint_url=http://here"]) == 0
    assert len(accesses) == 3
    assert all(access.options == {"s3": {"endpoint_url": "http://here"}} for access in accesses), accesses


@pytest.mark.parametrize("target", ["pixels"])
def test_pixels_are_drawn_without_a_tokenizer(run: Path) -> None:
    assert pictures.main([str(run), "--samples", "2"]) == 0
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["loss.png", "panel.png"]


def test_curves_need_no_tokenizer_and_a_line_says_what_the_panel_needs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pictures.main(["--run", str(run)]) == 0
    assert [path.name for path in (run / "pictures").iterdir()] == ["loss.png"]
    said = "no panel.png: it needs the tokenizer that made the shards. Name its file with --tokenizer FILE"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("where", ["recipe", "data", "beside"])
def test_a_tokenizer_that_fits_is_found_and_another_is_not_taken(run: Path, tmp_path: Path, where: str) -> None:
    config = DVAEConfig(vocabulary=64, hidden=8, blocks_per_group=1, decoder_input=4)
    save_tokenizer(tmp_path / "data" / "tokenizer.safetensors", DVAE(config), config)
    assert pictures.main([str(run)]) == 0
    assert not (run / "pictures" / "panel.png").exists()
    if where == "recipe":
        change_recipe(run, tokenizer=str(tmp_path / "dvae.safetensors"))
    else:
        folder = tmp_path / "data" if where == "data" else tmp_path
        shutil.copy(tmp_path / "dvae.safetensors", folder / "tokenizer.safetensors")
    assert pictures.main([str(run)]) == 0
    assert (run / "pictures" / "panel.png").exists()


def test_the_panel_shows_held_out_images_under_their_names_where_there_are_any(
    run: Path, tmp_path: Path, figures: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(run) == 0
    assert "panel.png: images it was trained on" in capsys.readouterr().out
    assert "images it was trained on, step 2" in words_of(figures[-1]).replace("\n", " ")
    hold_out(run, tmp_path / "data" / "held-out")
    assert draw(run) == 0
    assert "panel.png: held-out images" in capsys.readouterr().out
    assert "held-out images, step 2" in words_of(figures[-1]).replace("\n", " ")
    assert "image-0.png" in words_of(figures[-1])
    change_recipe(run, validation={"data": str(hold_out(run, tmp_path / "others"))})
    shutil.rmtree(tmp_path / "data" / "held-out")
    assert draw(run) == 0
    assert "panel.png: held-out images" in capsys.readouterr().out


def test_what_is_right_stands_beside_what_guessing_gets_right(
    run: Path, tmp_path: Path, figures: list[Figure]
) -> None:
    assert command_inspect.main([str(tmp_path / "data")]) == 0  # writes statistics.json
    place, manifest = LocalPlace(tmp_path / "data"), load_manifest(tmp_path / "data")
    assert draw(run) == 0
    statistics = load_statistics(place, manifest)
    assert statistics is not None
    curves, panel = (words_of(figure) for figure in figures[-2:])
    assert f"% right,\n{100 * statistics.commonest_share:.0f} % by guessing" in panel
    assert f"frequency: {statistics.entropy:.2f}" in curves
    assert f"commonest token: {100 * statistics.commonest_share:.1f} %" in curves


def test_averaged_weights_are_taken_when_asked_for(run: Path, figures: list[Figure]) -> None:
    assert draw(run) == 0
    assert draw(run, "--ema") == 0
    assert averages[-2:] == [False, True]
    assert "averaged weights" in words_of(figures[-1])


def test_a_run_without_a_checkpoint_has_curves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    assert draw(run) == 0
    assert "no panel.png yet: the run has no checkpoint" in capsys.readouterr().out


def test_curves_are_drawn_when_the_data_is_no_longer_there(
    run: Path, tmp_path: Path, figures: list[Figure]
) -> None:
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"manifest\.json"):
        draw(run)
    assert "unknown: the data set" in words_of(figures[-1])


def test_a_run_of_a_tokenizer_is_drawn(
    run: Path, figures: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer_run(run)
    (run / "validation.jsonl").write_text(json.dumps({"step": 2, "psnr": 20.0, "used": 30}) + "\n")
    assert pictures.main([str(run)]) == 0
    assert [path.name for path in (run / "pictures").iterdir()] == ["loss.png"]
    assert "PSNR (dB)" in words_of(figures[-1])
    assert "run: training of a tokenizer of 64 tokens" in words_of(figures[-1])


def test_several_runs_are_drawn_over_each_other(run: Path, tmp_path: Path, figures: list[Figure]) -> None:
    other, out = tmp_path / "a $b$" / "run", tmp_path / "compared"
    shutil.copytree(run, other)
    with pytest.raises(ConfigError, match="--out: got None"):
        pictures.main([str(run), str(other)])
    assert pictures.main([str(run), str(other), "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["loss.png"]
    assert "a $b$/run" in words_of(figures[-1])
    make_tokenizer_run(other)
    with pytest.raises(ConfigError, match="RUN: got"):
        pictures.main([str(run), str(other), "--out", str(out)])


def make_tokenizer_run(run: Path) -> None:
    """Have a run folder say that a tokenizer is trained in it."""
    (run / "run.json").write_text(json.dumps({"kind": "tokenizer"}))
    (run / "config.yaml").write_text(yaml.safe_dump({"run": "r", "model": {"vocabulary": 64}}))


def change_recipe(run: Path, **changed: Any) -> None:
    """Change ``config.yaml``, and what the checkpoint says of it."""
    path = run / "config.yaml"
    recipe = yaml.safe_load(path.read_text()) | changed
    path.write_text(yaml.safe_dump(recipe))
    weights = drawing.open_weights  # the fixture's

    def changed_weights(place: str, **how: Any) -> Any:
        found = weights(place, **how)
        found.config = validate(PretrainingConfig, recipe)  # type: ignore[misc]
        return found

    drawing.open_weights = changed_weights  # type: ignore[assignment]


def test_a_step_folder_and_other_places_are_accepted(run: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "data", tmp_path / "moved")
    out = tmp_path / "elsewhere"
    options = ("--samples", "1", "--data", str(tmp_path / "moved"), "--out", str(out))
    assert draw(run / STEP, "--tokenizer", str(tmp_path / "dvae.safetensors"), *options) == 0
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "panel.png"]
    assert not (run / "pictures").exists()


def test_what_a_user_gets_wrong_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--samples"):
        draw(run, "--samples", "0")
    with pytest.raises(SystemExit):
        pictures.main([])
    with pytest.raises(DataError, match=r"run\.json"):
        pictures.main([str(tmp_path)])
    with pytest.raises(DataError, match=r"manifest\.json"):
        draw(run, "--data", str(tmp_path / "nowhere"))
    with pytest.raises(TokenizerError, match=r"other\.safetensors"):
        draw(run, "--tokenizer", str(tmp_path / "other.safetensors"))
