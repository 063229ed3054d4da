"""Rendered manifests run as Kubernetes would run them: the pods' commands, and the end of one that is deleted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from support.kustomize import KUBERNETES, Rendered, render
from support.pods import Cluster, Pod

from beit_dist.config.dvae import DVAEConfig
from beit_dist.models.dvae import DVAE
from beit_dist.shards.manifest import load_manifest
from beit_dist.shards.verification import verify
from beit_dist.weights.tokenizer_files import save_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 80
RECIPE = f"""\
run: unused
precision: fp32
model: {{size: tiny, width: 64, depth: 3, heads: 2, image_size: 32, patch_size: 8, vocabulary: 64, drop_path: 0.2}}
masking: {{min_block: 4}}
global_batch: 16
micro_batch: 4
steps: {STEPS}
optimizer: {{lr: 1e-3, warmup_steps: 5}}
loader: {{workers: 1, lanes: 4}}
checkpoint: {{every_steps: null, every_minutes: null}}
logging: {{every_steps: 1}}
"""


def customised(folder: Path, base: str, **own: Any) -> Rendered:
    """A user's kustomization on top of one of ours."""
    place = os.path.relpath(KUBERNETES, folder.resolve())
    own["transformers"] = [f"{place}/{each}" for each in own.get("transformers", ())]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [f"{place}/{base}"], **own}))
    return render(folder)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def until_step(run: Path, count: int, pods: list[Pod]) -> None:
    """Wait until so many steps are recorded."""
    deadline = time.monotonic() + 180
    while len(steps_of(run)) < count:
        if time.monotonic() > deadline or not all(pod.running for pod in pods):
            pytest.fail("\n".join(pod.output[-3000:] for pod in pods))
        time.sleep(0.02)


def test_a_training_whose_pod_is_deleted_resumes_in_its_replacement_and_finishes(
    tmp_path: Path, make_shards: Callable[..., Any]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "demo.yaml").write_text(RECIPE)
    recipes = {"name": "beit-configs", "behavior": "merge", "files": ["demo.yaml"]}
    rendered = customised(tmp_path / "mine", "overlays/local-cpu", configMapGenerator=[recipes])
    make_shards(tmp_path / "beit" / "shards", [50, 64, 33], views=2)
    run = tmp_path / "beit" / "pods"

    with Cluster(rendered, rendered.training, {"/beit": tmp_path / "beit"}, tmp_path / "cluster") as cluster:
        pods = [cluster.start(index) for index in (1, 0)]  # in whatever order they are scheduled
        until_step(run, 5, pods)
        deleted, other = pods
        codes = [deleted.delete(), other.wait(60)]
        assert codes == [75, 75], other.output[-3000:]
        assert [cluster.action(code) for code in codes] == ["Ignore", "Ignore"], "each has a replacement"
        stopped = json.loads((run / "PREEMPTED").read_text())["step"]
        assert 5 <= stopped < STEPS

        pods = [cluster.start(index) for index in (0, 1)]
        codes = [pod.wait(180) for pod in pods]
    said = pods[0].output
    assert codes == [0, 0], said[-3000:]
    assert [cluster.action(code) for code in codes] == ["Complete", "Complete"]
    assert f"resumed from step-{stopped:08d}.a0001" in said
    assert (run / "DONE").exists()
    assert not (run / "PREEMPTED").exists()
    lines = steps_of(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["attempt"] for line in lines] == [1] * stopped + [2] * (STEPS - stopped)
    ranks = json.loads((run / "run.json").read_text())["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]


def test_a_recipe_that_is_wrong_fails_the_job_at_once(tmp_path: Path, make_shards: Callable[..., Any]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "demo.yaml").write_text(RECIPE.replace("micro_batch", "micro_batches"))
    recipes = {"name": "beit-configs", "behavior": "merge", "files": ["demo.yaml"]}
    rendered = customised(tmp_path / "mine", "overlays/local-cpu", configMapGenerator=[recipes])
    (tmp_path / "beit").mkdir()
    with Cluster(rendered, rendered.training, {"/beit": tmp_path / "beit"}, tmp_path / "cluster") as cluster:
        pod = cluster.start(1)
        assert cluster.action(pod.wait(60)) == "FailJob", pod.output
    assert "micro_batches" in pod.output


def test_tokenising_in_three_steps_makes_a_data_set(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(12):
        path = data / "images" / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    config = DVAEConfig(vocabulary=32, hidden=4, blocks_per_group=1, decoder_input=4)
    save_tokenizer(data / "tokenizer.safetensors", DVAE(config, 0), config, {})
    (tmp_path / "mine").mkdir()
    variables = [
        {"name": "VIEWS", "value": "2"},
        {"name": "DECODERS", "value": "0"},
        {"name": "HELD_OUT", "value": "2"},
    ]
    containers = [{"name": "worker", "env": variables}]
    patch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "beit-tokenize-work"},
        "spec": {"completions": 2, "template": {"spec": {"containers": containers}}},
    }
    patches = [{"patch": yaml.safe_dump(patch)}]
    rendered = customised(tmp_path / "mine", "tokenize", patches=patches, transformers=["tokenize/workers"])

    for step in ("freeze", "work", "finish"):
        job = rendered.workloads[f"beit-tokenize-{step}"]
        with Cluster(rendered, job, {"beit-data": data}, tmp_path / step) as cluster:
            for index in range(job.spec.get("completions", 1)):
                pod = cluster.start(index)
                assert pod.wait(120) == 0, pod.output
        if step == "work":
            assert not (data / "shards" / "manifest.json").exists()
    manifest = load_manifest(str(data / "shards"))
    assert (manifest.views, manifest.samples) == (2, 10)
    assert not list(verify(str(data / "shards"), manifest))
    assert load_manifest(str(data / "shards" / "held-out")).samples == 2
