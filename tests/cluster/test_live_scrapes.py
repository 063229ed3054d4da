"""What each kind of task really serves: promtool accepts it, the table has it, and it does not grow with time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.forked import Forked
from support.prometheus import installed, until
from support.runs import ROOT, wait

from beit_dist.tokenizing.metrics import METRICS as TOKENISING
from corpus.writer import write_corpus

pytestmark = [pytest.mark.cluster, pytest.mark.server, pytest.mark.slow]

SHARED = """\
global_batch: 8
precision: fp32
checkpoint: {every_steps: 10, every_minutes: null}
logging: {every_steps: 1, metrics_port: 0}
"""
FINETUNING = f"""\
{SHARED}
model: {{width: 32, depth: 2, heads: 2, image_size: 32, patch_size: 8}}
loader: {{workers: 0}}
"""
RECIPES = {
    "tokenizer": f"""\
{SHARED}
model: {{vocabulary: 16, hidden: 8, blocks_per_group: 1, decoder_input: 8}}
view_size: 32
image_size: 16
held_out: 4
collapse: {{below: null}}
""",
    "classification": f"{FINETUNING}micro_batch: 8\nmixing: {{probability: 0}}\n",
    "segmentation": f"{FINETUNING}micro_batch: 8\ntask: segmentation\nviews: {{base_size: 40}}\n",
}
ENDLESS, AT_THEIR_END = ["steps=1000000", "validation.every_steps=5"], ["steps=3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 30, 48)
    return folder


def command(kind: str, corpus: Path, folder: Path) -> list[str]:
    """The program of a training, and its arguments."""
    recipe = folder / f"{kind}.yaml"
    recipe.write_text(RECIPES[kind])
    if kind == "tokenizer":
        places = ["--images", str(corpus / "images"), "--out", str(folder / "run.safetensors")]
        return [str(ROOT / "tools" / "train_tokenizer.py"), "--config", str(recipe), *places]
    places = [f"run={folder / 'run'}", f"data={corpus / 'images'}", f"validation.data={corpus / 'images'}"]
    return [str(ROOT / "beit_dist" / "finetune.py"), "--config", str(recipe), *places]


@contextlib.contextmanager
def training(kind: str, corpus: Path, folder: Path) -> Iterator[int]:
    """A run that trains until the end of the block; its port."""
    run = folder / ("run.run" if kind == "tokenizer" else "run")
    process = Forked([*command(kind, corpus, folder), *ENDLESS], os.environ, folder)
    try:
        until(lambda: (run / "metrics.jsonl").exists() or process.poll() is not None, "the first step")
        assert process.poll() is None, wait(process)
        yield json.loads((run / "run.json").read_text())["metrics_port"]
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        code, output = wait(process, 60)
    assert code == 0, output


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def series_of(text: str) -> set[str]:
    """Names with labels, without what the client adds about itself."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    names = {line.rpartition(" ")[0] for line in lines}
    return {name for name in names if "_created" not in name}


def value_of(text: str, name: str) -> float:
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def check(text: str, table: Any) -> None:
    """Promtool finds nothing wrong, and every series is one of the table, with its labels."""
    done = subprocess.run([installed("promtool"), "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    endings = {
        "counter": ("_total",),
        "gauge": ("",),
        "info": ("_info",),
        "histogram": ("_sum", "_count", "_bucket"),
    }
    labels = {metric.name + ending: metric.labels for metric in table for ending in endings[metric.kind]}
    for series in series_of(text):
        name, _, said = series.partition("{")
        assert name in labels, f"{name} is in no table of docs/metrics.md"
        if not name.endswith(("_info", "_bucket")):
            assert set(re.findall(r'(\w+)="', said)) == set(labels[name])


@pytest.mark.parametrize("kind", RECIPES)
def test_a_training_serves_what_its_table_has_and_no_series_comes_with_time(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    import doc_tables

    with training(kind, corpus, tmp_path) as port:
        until(lambda: value_of(scraped(port), 'beit_checkpoint_saves_total{result="ok"}') >= 2, "two checkpoints")
        early = until(
            lambda: (text := scraped(port)) * (value_of(text, "beit_validation_step") > 0), "a measurement"
        )
        steps = value_of(early, "beit_train_steps_total")
        late = until(
            lambda: (text := scraped(port)) * (value_of(text, "beit_train_steps_total") > steps + 12), "steps"
        )
    assert series_of(late) == series_of(early)
    check(late, (*doc_tables.METRICS, *doc_tables.metrics_of(kind)))
    assert f'kind="{kind}"' in late


def test_the_workers_of_shards_write_what_their_table_has(corpus: Path, tmp_path: Path) -> None:
    code, output = wait(Forked([*command("tokenizer", corpus, tmp_path), *AT_THEIR_END], os.environ, tmp_path))
    assert code == 0, output
    images = shutil.copytree(corpus / "images", tmp_path / "images")
    next(images.rglob("*.jpg")).write_bytes(b"no image")
    words = ["--images", str(images), "--out", str(tmp_path / "shards"), "--image-size", "32", "--patch-size", "8"]
    words += ["--max-rejected", "1", "--tokenizer", str(tmp_path / "run.safetensors")]
    words += ["--metrics-textfile", str(tmp_path / "x.prom")]
    code, output = wait(Forked([str(ROOT / "tools" / "shard_tokens.py"), *words], os.environ, tmp_path))
    assert code == 0, output
    text = (tmp_path / "x.prom").read_text()
    rejected = 'beit_tokenize_images_rejected_total{reason="not_an_image",worker="0"} 1.0'
    assert rejected in text, re.sub("^#.*\n", "", text, flags=re.MULTILINE)
    check(text, TOKENISING)
