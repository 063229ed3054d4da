"""What tests share: few threads, and tiny data sets written through the real writer."""

# ruff: noqa: E402 (thread limits come before the imports that start threads)

from __future__ import annotations

import os
import tempfile

# Before torch and NumPy are imported: tests run side by side, and the order of sums depends on the threads.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# And what they compile is kept beside other temporary files, not in the user's cache.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "beit_dist-tests-compiled"))

import importlib.util
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from beit_dist.draws import Purpose, words
from beit_dist.shards.manifest import Manifest, ShardInfo, shard_name
from beit_dist.shards.sample import SampleLayout, SampleNotes, sample_key
from beit_dist.shards.writer import ShardWriter

pytest_plugins = ["support.disks", "support.figures", "support.runs", "support.servers"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With ``BEIT_SKIP_NOTHING=1``, as in CI, a test that skips for want of anything fails."""
    report = yield
    required = os.environ.get("BEIT_SKIP_NOTHING", "0") not in ("", "0")
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        report.outcome, report.longrepr = "failed", f"BEIT_SKIP_NOTHING is set, and this test: {reason}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests come first: at the end there shall be enough small ones for every process."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def write_shards(
    root: str | Path,
    shard_samples: Sequence[int] = (8, 8, 5),
    views: int = 1,
    image_size: int = 32,
    patch_size: int = 8,
    vocabulary: int = 64,
    seed: int = 0,
    gaps: int = 0,
    first: int = 0,
) -> Manifest:
    """A valid data set of seeded random patches and tokens in ``root``.

    Args:
        shard_samples: samples of each shard of a view.
        gaps: ids left out, spread over the list, as rejected images leave them.
        first: the lowest id.
    """
    root = Path(root)
    layout = SampleLayout(image_size, patch_size, vocabulary)
    samples = sum(shard_samples)
    ids = [first + row + (row + 1) * gaps // (samples + 1) for row in range(samples)]
    shards = []
    for view in range(views):
        (root / f"v{view:02d}").mkdir(parents=True, exist_ok=True)
        begin = 0
        for index, count in enumerate(shard_samples):
            name = shard_name(view, index)
            with open(root / name, "wb") as file:
                writer = ShardWriter(file, layout)
                for sample_id in ids[begin : begin + count]:
                    _write_random(writer, view, sample_id, seed)
                written = writer.close()
            shards.append(ShardInfo(name, written.bytes, written.samples, written.sha256))
            begin += count
    manifest = Manifest(layout, "0" * 64, views, seed, gaps, tuple(shards))
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    return manifest


def _write_random(writer: ShardWriter, view: int, sample_id: int, seed: int) -> None:
    layout = writer.layout
    numbers = -(-layout.patches_nbytes // 8) + layout.patches
    raw = words(seed, Purpose.CORPUS, (view, sample_id), numbers)
    pixels = raw.astype("<u8").view(np.uint8)[: layout.patches_nbytes]
    tokens = (raw[-layout.patches :] % np.uint64(layout.vocabulary)).astype(np.int16)
    writer.write(
        sample_key(view, sample_id),
        pixels.reshape(layout.patches, layout.patch_bytes),
        tokens.reshape(layout.grid, layout.grid),
        SampleNotes(f"image-{sample_id}.png", label=f"class-{sample_id % 3}"),
    )


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Manifest]:
    """``make_shards(root, shard_samples=[8, 8, 5], views=1, ...) -> Manifest``; see :func:`write_shards`."""
    return write_shards


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """``load_tool("check_shards")`` imports a command of tools/, which is no package."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).resolve().parents[1] / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"tools_{name}", path)
        if spec is None or spec.loader is None:
            raise ImportError(path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not see the worker index or the ranks of a scheduler that may run them."""
    from beit_dist.engine.ranks.launchers import VARIABLES

    schedulers = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "BEIT_WORKERS")
    for name in (*schedulers, *VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
