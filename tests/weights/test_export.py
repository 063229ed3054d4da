"""Exported weights are the run's to the last bit, and need neither memory for all of them nor DeepSpeed."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from beit_dist.checkpoints.files import write_fragments
from beit_dist.checkpoints.image import FileImage
from beit_dist.checkpoints.layout import MANIFEST, Fragment, sealed, summed
from beit_dist.commands import export
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.errors import CheckpointError
from beit_dist.storage.access import Access
from beit_dist.storage.durable import write_once
from beit_dist.storage.local import LocalPlace
from beit_dist.weights import stored
from beit_dist.weights.export import DTYPES, export_weights
from beit_dist.weights.forms import PRECISIONS
from beit_dist.weights.stored import load_weights, open_weights

SHAPES = {"blocks.0.weight": [30, 20], "blocks.0.bias": [7], "cls_token": [1, 1, 9], "norm.bias": []}


def write_checkpoint(
    run: Path,
    shapes: dict[str, list[int]] = SHAPES,
    roles: tuple[str, ...] = ("weight", "exp_avg"),
    ranks: int = 2,
) -> Path:
    """A committed checkpoint of seeded values, each parameter cut over the ranks."""
    folder = run / "checkpoints" / "step-00000005.a0001"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    cut: list[list[Fragment]] = [[] for _ in range(ranks)]
    for name, shape in shapes.items():
        for role in roles:
            values = torch.randn(shape, generator=generator).view(-1)
            edges = [len(values) * rank // ranks for rank in range(ranks + 1)]
            for rank, (low, high) in enumerate(itertools.pairwise(edges)):
                if low < high:
                    cut[rank].append(Fragment(name, role, low, values[low:high]))
    files, digests = [], []
    for rank, fragments in enumerate(cut):
        write_fragments(LocalPlace(folder), rank, FileImage.of(fragments))
        record = json.loads((folder / f"rank-{rank:05d}.json").read_bytes())
        files.append({name: record[name] for name in ("file", "bytes", "sha256")})
        digests.append(record["state_digests"])
    for rank in range(ranks):
        content = (folder / f"rank-{rank:05d}.json").read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        files.append({"file": f"rank-{rank:05d}.json", "bytes": len(content), "sha256": sha256})
    manifest = {
        "format": 1,
        "step": 5,
        "position": {"samples": 80},
        "dataset": "d" * 64,
        "tokenizer": "t" * 64,
        "parameters": shapes,
        "state_digests": summed(digests),
        "files": files,
        "config": PretrainingConfig(run="r", model={"size": "tiny"}).model_dump(mode="json"),
    }
    write_once(folder / MANIFEST, sealed(manifest))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run")


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


def test_exported_tensors_are_those_of_the_checkpoint_bit_for_bit(run: Path, tmp_path: Path) -> None:
    weights, _, _ = load_weights(run)
    exported = export_weights(open_weights(run), tmp_path / "out")
    got, _ = read(tmp_path / "out" / "model.safetensors")
    assert exported.bytes == exported.path.stat().st_size
    assert list(got) == sorted(weights)
    assert all(torch.equal(got[name], weights[name]) and got[name].shape == weights[name].shape for name in got)
    export_weights(open_weights(run), tmp_path / "low.safetensors", "bf16")
    low, _ = read(tmp_path / "low.safetensors")
    assert all(torch.equal(low[name], weights[name].bfloat16()) for name in weights)


def test_the_metadata_says_how_to_use_the_weights(run: Path, tmp_path: Path) -> None:
    export_weights(open_weights(run), tmp_path)
    _, metadata = read(tmp_path / "model.safetensors")
    assert json.loads(metadata["model"])["width"] == 192
    assert json.loads(metadata["pixel_mean"]) == [0.5, 0.5, 0.5]
    assert (metadata["step"], metadata["samples"], metadata["tokenizer"]) == ("5", "80", "t" * 64)


def test_memory_is_needed_for_one_tensor(tmp_path: Path) -> None:
    mebibytes = 4
    shapes = {f"p{number}": [mebibytes << 8, 1 << 10] for number in range(16)}
    run = write_checkpoint(tmp_path / "run", shapes, roles=("weight",), ranks=1)
    seen: list[int] = []
    export_weights(open_weights(run), tmp_path / "out", advance=lambda _: seen.append(private_bytes()))
    assert len(seen) == 16
    assert max(seen) - seen[0] < mebibytes << 20


def private_bytes() -> int:
    """Memory of this process that is not a file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    pytest.skip("this system does not say how much memory is a process's own")


def test_a_damaged_checkpoint_is_not_exported_and_leaves_no_file(run: Path, tmp_path: Path) -> None:
    file = next(run.rglob("rank-00001.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors has a sha256 that differs"):
        open_weights(run)


def test_an_export_cut_short_leaves_what_was_there(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model.safetensors"
    export_weights(open_weights(run), target)
    before = target.read_bytes()

    def stop(values: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_weights(open_weights(run), target, "bf16", stop)
    assert target.read_bytes() == before
    assert list(target.parent.iterdir()) == [target]


def test_a_run_without_an_average_says_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a run with ema\.decay"):
        open_weights(run, ema=True)
    averaged = write_checkpoint(tmp_path / "averaged", roles=("weight", "ema"))
    trained, average = load_weights(averaged)[0], load_weights(averaged, ema=True)[0]
    assert not torch.equal(trained["cls_token"], average["cls_token"])


def test_a_step_folder_may_be_copied_anywhere_under_any_name(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / "checkpoints" / "step-00000005.a0001", tmp_path / "best"))
    weights, copied = load_weights(run)[0], load_weights(copy)[0]
    assert all(torch.equal(copied[name], weights[name]) for name in weights)
    (copy / "rank-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"best: rank-00001\.safetensors: No such file"):
        open_weights(copy)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"format": 2}, "got format 2, expected 1"),
        ({"codebook": {}}, "a checkpoint of a tokenizer run, expected one of a pretraining run"),
        ({"given_up_for": 2}, "it was never committed"),
    ],
)
def test_what_holds_no_weights_of_a_model_is_refused(run: Path, facts: dict[str, Any], said: str) -> None:
    path = next(run.rglob(MANIFEST))
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    path.write_bytes(sealed({**manifest, **facts}))
    with pytest.raises(CheckpointError, match=said):
        open_weights(path.parent)


def test_every_precision_that_can_be_asked_for_can_be_written() -> None:
    assert tuple(DTYPES) == PRECISIONS


def test_the_command_takes_how_urls_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(run: str, ema: bool, access: Access, kinds: Collection[str]) -> None:
        raise CheckpointError(f"{run} within {access.retry_seconds:g} s")

    monkeypatch.setattr(stored, "open_weights", opened)
    with pytest.raises(CheckpointError, match="s3://b/run within 7 s"):
        export.main(["s3://b/run", "--to", "hf", "--out", "x", "--storage", "retry_seconds=7"])


def test_the_command_writes_the_file_and_says_what_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(run), "--to", "safetensors", "--out", str(tmp_path / "a"), "--dtype", "bf16"]) == 0
    assert "weights of step-00000005.a0001, 4 tensors in bf16" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="expected a run folder or step folder"):
        export.main([str(tmp_path), "--to", "safetensors", "--out", str(tmp_path / "b")])


def test_exporting_needs_no_deepspeed(run: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "export_checkpoint.py"
    program = "import runpy, sys; sys.modules['deepspeed'] = None; del sys.argv[0]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [str(tool), str(run), "--to", "safetensors", "--out", str(tmp_path / "a.safetensors")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(read(tmp_path / "a.safetensors")[0]) == sorted(SHAPES)
