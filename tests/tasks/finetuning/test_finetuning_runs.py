"""Whole runs of fine-tuning: stopped, resumed on other ranks, from a pre-trained model, and refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.runs import ROOT, Run

pytestmark = pytest.mark.slow

MODEL = "{width: 32, depth: 2, heads: 2, image_size: 32, patch_size: 8, drop_path: 0.2, layer_scale: 0.1}"
RECIPE = """\
global_batch: 8
steps: 8
layer_decay: 0.7
optimizer: {lr: 1e-2, warmup_steps: 2}
precision: fp32
loader: {workers: 1, timeout_seconds: 120}
validation: {every_steps: 4, samples: 5}
checkpoint: {every_steps: 3, every_minutes: null}
logging: {every_steps: 1, metrics_port: null}
"""
KINDS = {
    "classification": "micro_batch: 4\naugmentation: {erasing: 0.5}\n",
    # All of a step at once: batch normalisation is over a micro-batch.
    "segmentation": "task: segmentation\nmicro_batch: 8\nviews: {base_size: 40}\n"
    "maps: {ids: [0, 2], ignore_label: 9}\n",
}
SHORT = ("steps=2", "optimizer.warmup_steps=0")
NUMBERS = ("step", "samples", "loss", "lr", "grad_norm", "skipped", "batch")


def photograph(number: int, colour: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Noise, in one channel brighter than in the others."""
    pixels = np.random.default_rng(number).integers(0, 120, (*size, 3), dtype=np.uint8)
    pixels[..., colour] += 110
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders in train/ and test/, and images/ with label maps beside them."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, count in (("train", 7), ("test", 3)):
        for colour, name in enumerate(("red", "green", "blue")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                photograph(100 * colour + number, colour).save(folder / part / name / f"{number}.png")
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(2 * count):
            left, right = photograph(number, number % 3), photograph(50 + number, (number + 1) % 3)
            whole = Image.new("RGB", (80, 48))
            whole.paste(left, (0, 0))
            whole.paste(right, (40, 0))
            whole.save(folder / "images" / part / f"{number}.png")
            labels = np.full((48, 80), number % 3, np.uint8)
            labels[:, 40:] = (number + 1) % 3
            labels[0] = 9
            Image.fromarray(labels).save(folder / "labels" / part / f"{number}.png")
    return folder


@pytest.fixture
def new_finetuning(tmp_path: Path, labelled: Path) -> Callable[..., Run]:
    """``new_finetuning(name, kind, ranks=1, overrides=[], model=MODEL)``."""

    def make(
        name: str, kind: str, ranks: int = 1, overrides: Any = (), model: str | None = MODEL, ds: str = "zero1"
    ) -> Run:
        recipe = tmp_path / f"{name}.yaml"
        sizes = "" if model is None else f"model: {model}\n"
        recipe.write_text(f"{RECIPE}{sizes}{KINDS[kind]}")
        data = labelled / ("train" if kind == "classification" else "images/train")
        held_out = data.parent / "test"
        return Run(
            tmp_path / name,
            data,
            recipe,
            ROOT / "configs" / "deepspeed" / f"{ds}.json",
            ranks,
            [f"validation.data={held_out}", *overrides],
            entry=ROOT / "beit_dist" / "finetune.py",
        )

    return make


def lines(run: Run) -> list[tuple[Any, ...]]:
    """What must be equal to the last bit between two runs, one tuple a step."""
    return [tuple(line[name] for name in NUMBERS) for line in run.lines()]


def results(run: Run) -> list[dict[str, Any]]:
    """What was measured, without times."""
    found = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "attempt")} for line in found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_as_one_that_never_stopped_and_on_other_ranks_with_the_same_batches(
    new_finetuning: Callable[..., Run], kind: str
) -> None:
    whole = new_finetuning("whole", kind)
    code, output = whole.finish()
    assert code == 0, output
    assert len(whole.lines()) == 8
    assert [line["step"] for line in results(whole)] == [4, 8]
    counted = {"classification": "images", "segmentation": "pixels"}[kind]
    few, everything = (line[counted] for line in results(whole))
    assert few < everything == {"images": 9, "pixels": 6 * 47 * 80}[counted]

    stopped = new_finetuning("stopped", kind)
    code, output = stopped.signal_at(3, signal.SIGTERM)
    assert code == 0, output
    assert (stopped.folder / "PREEMPTED").exists()
    code, output = stopped.finish()
    assert code == 0, output
    assert lines(stopped) == lines(whole)
    assert results(stopped) == results(whole)
    assert stopped.final_files() == whole.final_files()

    half = {"classification": 2, "segmentation": 4}
    several = new_finetuning("several", kind, ranks=2, overrides=[f"micro_batch={half[kind]}"], ds="zero3")
    code, output = several.finish()
    assert code == 0, output
    assert [line["batch"] for line in several.lines()] == [line["batch"] for line in whole.lines()]
    assert [line["loss"] for line in several.lines()] == pytest.approx(
        [line["loss"] for line in whole.lines()], rel=2e-3
    )
    last, expected = results(several)[-1], results(whole)[-1]
    assert last[counted] == expected[counted]
    assert last["loss"] == pytest.approx(expected["loss"], rel=2e-2)


def test_sizes_and_weights_come_from_the_pre_trained_run_and_a_segmentation_from_a_classification(
    new_run: Callable[..., Run], new_finetuning: Callable[..., Run]
) -> None:
    pretrained = new_run("pretrained", overrides=[*SHORT, "loader.workers=0"])
    code, output = pretrained.finish()
    assert code == 0, output
    classes = new_finetuning(
        "classes",
        "classification",
        overrides=[f"init_from={pretrained.folder}", *SHORT, "ema.decay=0.5"],
        model=None,
    )
    code, output = classes.finish()
    assert code == 0, output
    assert f"weights of {pretrained.folder}, step-" in output
    assert "2 blocks of width 32, 2 heads; no absolute positions, a relative bias in each block" in output
    assert "these start from scratch: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in output
    manifest = newest(classes)
    assert manifest["classes"] == ["blue", "green", "red"]
    assert manifest["init_from"]["checkpoint"] == newest_folder(pretrained).name

    # What the run has of the model holds for its next start too, whatever has become of its origin.
    (pretrained.folder / "checkpoints").rename(pretrained.folder / "gone")
    code, output = classes.finish("steps=3")
    assert code == 0, output

    segments = new_finetuning(
        "segments", "segmentation", overrides=[f"init_from={classes.folder}", *SHORT], model=None
    )
    code, output = segments.finish()
    assert code == 0, output
    assert "left out: fc_norm.bias, fc_norm.weight, head.bias, head.weight" in output
    buffers = newest(segments)["buffers"]
    assert any(name.endswith("running_mean") for name in buffers)


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(
    new_finetuning: Callable[..., Run], labelled: Path, tmp_path: Path
) -> None:
    run = new_finetuning("refused", "classification")
    for overrides, said in (
        (["global_batch=7"], "a multiple of 2, as images are mixed in pairs"),
        ([f"data={labelled / 'train' / 'red'}"], "images have no class"),
        ([f"validation.data={labelled / 'images'}"], "got 2 classes test, train, which the training"),
        (["mixing.mixup=0.2"], "0, or a number above 0.5"),
        (["task=detection"], "task: got 'detection'"),
    ):
        code, output = run.finish(*overrides)
        assert code == 2, output
        assert said in output
        assert "Traceback" not in output
        assert not run.folder.exists()


def newest_folder(run: Run) -> Path:
    """The newest checkpoint."""
    checkpoints = run.folder / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip()


def newest(run: Run) -> dict[str, Any]:
    """Its manifest."""
    found: dict[str, Any] = json.loads((newest_folder(run) / "manifest.json").read_text())
    return found
