"""From images to weights on a real SLURM: the pipeline, arrays in parts, and ranks in a shell of salloc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.slurm import Slurm
from support.slurm_jobs import ENDED, SCRIPTS, assert_untold, lines, settings

from beit_dist.config.dvae import DVAEConfig
from beit_dist.models.dvae import DVAE
from beit_dist.shards.manifest import load_manifest
from beit_dist.weights.tokenizer_files import save_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

SHARDS = ["--image-size", "32", "--patch-size", "8", "--shard-samples", "4", "--decoders", "0"]
SMALL = ["--cpus-per-task=1", "--gpus-per-node=0", "--time=30"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With 24 images and a tokenizer."""
    for image in range(24):
        path = tmp_path / "images" / f"{image}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(image).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    config = DVAEConfig(vocabulary=64, hidden=4, blocks_per_group=1, decoder_input=4)
    save_tokenizer(tmp_path / "tokenizer.safetensors", DVAE(config, 0), config, {})
    return tmp_path


def said(folder: Path) -> str:
    """What all jobs have printed."""
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("*.out")))


def wait(slurm: Slurm, folder: Path, number: str) -> str:
    """The state in which a job has ended."""
    deadline = time.monotonic() + 400
    while (state := slurm.job(number)["JobState"]) not in ENDED:
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.2)
    return state


def test_a_pipeline_turns_images_into_weights_and_no_second_one_disturbs_it(slurm: Slurm, folder: Path) -> None:
    environment = {
        **slurm.environment,
        **settings(folder),
        "RUN": "run",
        "DATA": "shards",
        "BEIT_WORKERS": "2",
        "STEP_SBATCH": "--cpus-per-task=1 --time=30",
        "TOKENIZE_SBATCH": " ".join(SMALL),
        "PRETRAIN_SBATCH": f"--nodes=2 --ntasks-per-node=1 {' '.join(SMALL)}",
        "MASTER_ADDR": "127.0.0.1",
    }
    command = ["bash", str(SCRIPTS / "pipeline.sh"), "steps=8", "--", *SHARDS]

    def pipeline() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    first, second = pipeline(), pipeline()
    assert first.returncode == 0, first.stderr
    freeze, *_, export = [line.rpartition(" ")[2] for line in first.stdout.splitlines()]
    assert second.returncode == 2
    assert f"error: RUN: run belongs to job {freeze} (beit-freeze" in second.stderr
    assert second.stdout == ""

    assert wait(slurm, folder, export) == "COMPLETED", said(folder)
    workers = [path.read_text() for path in sorted(folder.glob("beit-tokenize-*_[01].out"))]
    assert ["3 shards made" in text for text in workers] == [True, True], workers
    manifest = load_manifest(str(folder / "shards"))
    assert (manifest.samples, len(manifest.shards)) == (24, 6)
    check = [sys.executable, "-m", "beit_dist", "check", str(folder / "shards")]
    assert subprocess.run(check, env=environment, capture_output=True, timeout=120).returncode == 0
    assert (folder / "run" / "DONE").exists()
    assert (folder / "run" / "exported" / "model.safetensors").stat().st_size > 0
    assert not list((folder / "targets").rglob("*.json*"))
    assert_untold(folder)
    assert [line.endswith("is there") for line in pipeline().stdout.splitlines()] == [True] * 3


def test_an_array_in_two_halves_and_single_tasks_again_are_the_same_workers(slurm: Slurm, folder: Path) -> None:
    images, tokenizer, out = (str(folder / name) for name in ("images", "tokenizer.safetensors", "shards"))
    environment = {**settings(folder), "BEIT_WORKERS": "4", "IMAGES": images, "TOKENIZER": tokenizer}

    def submitted(script: str, *arguments: str, array: str = "") -> str:
        options = [f"--array={array}"] if array else []
        small = SMALL if array else [SMALL[0], SMALL[2]]
        command = [
            "sbatch",
            "--parsable",
            f"--chdir={folder}",
            *options,
            *small,
            str(SCRIPTS / script),
            *arguments,
        ]
        return slurm(*command, **environment).strip()

    def array(tasks: str) -> list[str]:
        number = submitted("tokenize.sbatch", *SHARDS, array=tasks)
        deadline = time.monotonic() + 400
        while slurm("squeue", "--noheader", f"--jobs={number}").strip():
            assert time.monotonic() < deadline, said(folder)
            time.sleep(0.2)
        return [path.read_text() for path in sorted(folder.glob(f"beit-tokenize-{number}_*.out"))]

    steps = ["shards", "--images", images, "--out", out, "--tokenizer", tokenizer, *SHARDS]
    assert wait(slurm, folder, submitted("beit.sbatch", *steps, "--index-only")) == "COMPLETED", said(folder)
    assert [f"worker {index} of 4" in text for index, text in enumerate(array("0-1"))] == [True, True]
    assert [f"worker {index} of 4" in text for index, text in enumerate(array("2-3"), 2)] == [True, True]
    assert wait(slurm, folder, submitted("beit.sbatch", *steps, "--finish")) == "COMPLETED", said(folder)
    whole = load_manifest(str(folder / "shards"))
    assert (whole.samples, len(whole.shards)) == (24, 6)

    (folder / "shards" / "manifest.json").unlink()
    shards = sorted((folder / "shards").rglob("*.tar"))
    lost = shards[0]
    lost.unlink()
    (again,) = array("0")
    assert "worker 0 of 4" in again
    assert lost.exists(), again
    assert wait(slurm, folder, submitted("beit.sbatch", *steps, "--finish")) == "COMPLETED", said(folder)
    assert load_manifest(str(folder / "shards")) == whole
    assert not list((folder / "targets").rglob("*.json*"))
    assert_untold(folder)


def test_ranks_of_salloc_train_and_take_the_gpu_of_their_task(
    slurm: Slurm, tmp_path: Path, make_shards: Callable[..., Any]
) -> None:
    make_shards(tmp_path / "shards", [50, 64, 33], views=2)
    known = settings(tmp_path)
    look = (
        "import os; from beit_dist.engine.ranks.devices import device_index; "
        "seen = os.environ['CUDA_VISIBLE_DEVICES'].split(','); "
        "print('gpu', os.environ['SLURM_PROCID'], seen[device_index(int(os.environ['SLURM_LOCALID']), len(seen))])"
    )
    train = [
        sys.executable,
        "-m",
        "beit_dist.train",
        "--ds_config",
        known["DS_CONFIG"],
        "--config",
        known["RECIPE"],
    ]
    train += [f"run={tmp_path / 'run'}", f"data={known['DATA']}", "steps=3", "optimizer.warmup_steps=1"]
    script = 'srun "$1" -c "$2" && shift 2 && srun --ntasks=2 --ntasks-per-node=1 "$@"'
    allocated = ["salloc", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--gpus-per-task=1"]
    found = slurm(
        *allocated, "bash", "-c", script, "bash", sys.executable, look, *train,
        **known, MASTER_ADDR="127.0.0.1", MASTER_PORT="17171",
    )  # fmt: skip
    gpus = dict(line.split()[1:] for line in found.splitlines() if line.startswith("gpu"))
    if os.getuid() == 0:  # SLURM can only count the devices of others
        assert gpus == {"0": "0", "1": "1", "2": "0", "3": "1"}
    assert (tmp_path / "run" / "DONE").exists()
    assert len(lines(tmp_path / "run")) == 3
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["world_size"] == 2
