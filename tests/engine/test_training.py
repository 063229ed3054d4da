"""Real runs under the real launcher: continued at each stage and precision, and what a user can get wrong."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.engine.run_folder import DONE, MARKERS
from beit_dist.errors import ConfigError, UserError
from beit_dist.storage.opening import open_place
from beit_dist.train import main

pytestmark = pytest.mark.slow

STAGES: dict[str, dict[str, Any]] = {
    "stage 0, fp32": {"zero_optimization": {"stage": 0}},
    "stage 0, bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "stage 1, fp32": {"zero_optimization": {"stage": 1}},
    "stage 2, bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "stage 3, bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "stage 1, bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}


@pytest.mark.parametrize("stage", ["stage 0, fp32", "stage 3, bf16"])
def test_the_whole_program_resumes_bit_for_bit(new_run: Callable[..., Any], stage: str) -> None:
    """All stages and precisions, in one process, are in ``test_states.py``."""
    whole = new_run("whole", STAGES[stage], overrides=["loader.workers=0", "steps=16"])
    code, output = whole.finish()
    assert code == 0, output
    assert_it_tells_its_story(output, whole.folder)

    cut = new_run("cut", STAGES[stage], overrides=["loader.workers=0", "steps=16"])
    shutil.copytree(whole.folder, cut.folder)
    for newer in cut.folder.glob("checkpoints/step-00000016.*"):  # as if it had died after step 14
        shutil.rmtree(newer)
    code, output = cut.finish()
    assert code == 0, output
    assert "resumed from step-00000014" in output
    assert cut.numbers() == whole.numbers()
    assert cut.final_files() == whole.final_files()


def assert_it_tells_its_story(output: str, folder: Path) -> None:
    """What is trained, on what, for how long; a line after the first step; what came of it; what to do next."""
    lines = output.splitlines()
    subjects = [line.partition("  ")[0] for line in lines]
    first = subjects.index("step 1/16")
    told = {"run", "model", "data", "held out", "baselines", "steps", "parameters", "batch", "precision", "ranks"}
    assert told <= set(subjects[:first])
    assert f"{folder}, a new run" in lines[subjects.index("run")]
    assert "uniform 4.1589" in lines[subjects.index("baselines")]
    end = next(at for at, line in enumerate(lines) if line.startswith("done: step 16 of 16 in "))
    assert first < end
    assert lines[-3:] == ["next:", f"  beit pictures {folder}", f"  beit export {folder} --to hf --out exported/"]


def test_fp16_resumes_with_its_loss_scale(new_run: Callable[..., Any]) -> None:
    """Few CPUs have fast fp16, so DeepSpeed refuses it there; slow is fast enough for a test."""
    fp16 = {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 4}
    runs = []
    for name in ("whole", "cut"):
        run = new_run(name, {"zero_optimization": {"stage": 1}, "fp16": fp16}, overrides=["loader.workers=0"])
        run.entry = run.folder.parent / "fp16.py"
        run.entry.write_text(
            "import runpy\n"
            "import torch\n"
            "from deepspeed.accelerator import get_accelerator\n"
            "kind = type(get_accelerator())\n"
            "kind.is_fp16_supported = lambda self: True\n"
            "kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]\n"
            f"runpy.run_path({str(Path(__file__).parents[2] / 'beit_dist' / 'train.py')!r}, run_name='__main__')\n"
        )
        runs.append(run)
    whole, cut = runs
    code, output = whole.finish("steps=16")
    assert code == 0, output
    assert any(line["skipped"] for line in whole.lines())
    shutil.copytree(whole.folder, cut.folder)
    for newer in cut.folder.glob("checkpoints/step-00000016.*"):
        shutil.rmtree(newer)
    saved = json.loads((cut.folder / "checkpoints/step-00000014.a0001/manifest.json").read_text())
    assert saved["loss_scale"]["cur_scale"] != 2.0**18
    code, output = cut.finish("steps=16")
    assert code == 0, output
    assert cut.numbers() == whole.numbers()
    assert cut.final_files() == whole.final_files()


def test_fp16_is_refused_where_the_device_has_none(new_run: Callable[..., Any]) -> None:
    run = new_run("run", {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}})
    code, output = run.finish()
    assert code in (0, 2)
    if code:
        assert "precision: got 'fp16', expected one that this cpu computes in. Use fp32 or auto." in output


def test_ranks_accumulation_and_mask_mode_do_not_change_the_loss(new_run: Callable[..., Any]) -> None:
    """The loss is the sum over masked patches by their number in the global batch (fp32 sums differ in order)."""
    for mode in ("exact", "paper"):
        runs = []
        for name, ranks, micro in (("one", 1, 16), ("four", 1, 4), ("two", 2, 4)):
            settings = ["steps=6", f"micro_batch={micro}", f"masking.mode={mode}", "loader.workers=0"]
            run = new_run(f"{mode}-{name}", STAGES["stage 1, fp32"], ranks=ranks, overrides=settings)
            code, output = run.finish()
            assert code == 0, output
            runs.append(run.lines())
        for other in runs[1:]:
            for name in ("loss", "accuracy", "grad_norm"):
                expected = [line[name] for line in runs[0]]
                assert [line[name] for line in other] == pytest.approx(expected, rel=1e-4)
            assert [line["masked"] for line in other] == [line["masked"] for line in runs[0]]
        if mode == "paper":
            assert len({line["masked"] for line in runs[0]}) > 1


def test_a_damaged_checkpoint_is_passed_over_and_the_run_still_ends_the_same(new_run: Callable[..., Any]) -> None:
    run = new_run("run", overrides=["loader.workers=0", "steps=16"])
    assert run.finish()[0] == 0
    expected, files = run.numbers(), run.final_files()
    newest = run.folder / "checkpoints" / "step-00000016.a0001" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    code, output = run.finish()
    assert code == 0, output
    assert "is damaged" in output
    assert "resumed from step-00000014" in output
    assert run.numbers() == expected
    assert run.final_files() == files


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "overrides", "said"),
    [
        (lambda data: (data / "v00" / "shard-000001.tar").unlink(), [], "v00/shard-000001.tar"),
        (lambda data: _cut(data / "v01" / "shard-000002.tar"), [], "v01/shard-000002.tar"),
        (lambda data: (data / "manifest.json").unlink(), [], "manifest.json"),
        (lambda data: None, ["model.vocabulary=128"], "model.vocabulary: got 128, expected 64"),
        (lambda data: None, ["model.patch_size=4"], "model.patch_size: got 4"),
        (lambda data: None, ["tokenizer=/nowhere.safetensors"], "/nowhere.safetensors"),
        (lambda data: None, ["optimiser.lr=1"], "Did you mean optimizer?"),
        (lambda data: None, ["data=null"], "data: got None"),
    ],
)
def test_what_a_user_can_get_wrong_is_named_before_anything_starts(
    new_run: Callable[..., Any], break_it: Callable[[Path], None], overrides: list[str], said: str
) -> None:
    run = new_run("run", overrides=overrides)
    run.data = Path(shutil.copytree(run.data, run.folder.parent / "data"))
    break_it(run.data)
    with pytest.raises(UserError) as caught:
        main(run.command()[2:])
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert not run.folder.exists()


def test_the_folder_of_a_data_set_is_no_run_folder(new_run: Callable[..., Any], small_data: Path) -> None:
    run = new_run("run")
    before = sorted(small_data.rglob("*"))
    for place in (str(small_data), f"memory://{uuid.uuid4()}/shards"):
        open_place(place).write("manifest.json", (small_data / "manifest.json").read_bytes())
        with pytest.raises(ConfigError, match=r"run: .* expected a folder of the run's own"):
            main([*run.command()[2:], f"run={place}"])
    assert sorted(small_data.rglob("*")) == before


def test_a_user_sees_one_line_and_no_traceback(new_run: Callable[..., Any]) -> None:
    run = new_run("run", ranks=2, overrides=["model.siz=1"], deepspeed=True)
    code, output = run.finish()
    assert code == 2
    assert output.count("error: model.siz: got 1, expected one of the known settings") == 1
    assert "Traceback" not in output


def test_a_flipped_byte_in_a_shard_ends_the_run_by_name(new_run: Callable[..., Any]) -> None:
    run = new_run("run", ranks=2, deepspeed=True)
    run.data = Path(shutil.copytree(run.data, run.folder.parent / "data"))
    _flip(run.data / "v00" / "shard-000000.tar", 2000)
    code, output = run.finish()
    assert code == 1
    assert "shard-000000.tar" in output
    assert "Traceback" not in output
    assert "Warning" not in output.partition("error: rank")[2]
    failed = json.loads((run.folder / "FAILED").read_text())
    assert failed["exit_code"] == 1
    assert "shard-000000.tar" in failed["error"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20000])


def test_another_model_or_data_set_cannot_continue_a_run(
    new_run: Callable[..., Any], make_shards: Callable[..., Any]
) -> None:
    run = new_run("run", overrides=["loader.workers=0", "steps=7"])
    assert run.finish()[0] == 0
    code, output = run.finish("model.depth=3")
    assert code == 2
    assert "model.depth was 2, now 3" in output
    assert [name for name in MARKERS if (run.folder / name).exists()] == [DONE]
    code, output = run.finish("seed=1")
    assert code == 2
    assert "seed was 0, now 1" in output
    other = run.folder.parent / "other"
    make_shards(other, [50, 64, 33], views=2, seed=9)
    code, output = run.finish(f"data={other}")
    assert code == 2
    assert "dataset_digest" in output
    code, output = run.finish("optimizer.lr=0.02", "steps=8")
    assert code == 0, output
    assert "changed on resume: optimizer.lr was 0.01, now 0.02" in output
    assert len(run.lines()) == 8


def test_gradients_that_are_never_finite_stop_the_run_without_an_update(new_run: Callable[..., Any]) -> None:
    run = new_run("run", overrides=["loader.workers=0", "optimizer.lr=1e38", "max_skipped_in_a_row=3"])
    code, output = run.finish()
    assert code == 1
    assert "3 steps in a row" in output
    assert "Traceback" not in output
    skipped = [line["skipped"] for line in run.lines()]
    assert skipped[-3:] == [True] * 3
    assert json.loads((run.folder / "FAILED").read_text())["exit_code"] == 1
