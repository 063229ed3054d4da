"""``beit plan`` prints a screen of 80 columns, the same as JSON, and holds a plan against what a run recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import Run

from beit_dist.commands.plan import kind_of, main, task_from
from beit_dist.config.recipes import shipped
from beit_dist.engine.memory import size_of_checkpoint
from beit_dist.errors import ConfigError
from beit_dist.planning import devices
from beit_dist.planning.comparison import recorded_run
from beit_dist.shards.manifest import Manifest

Plan = Callable[..., tuple[str, Any]]
SMALL = ["model.image_size=32", "model.patch_size=8", "model.vocabulary=64", "masking.min_block=4"]
SMALL += ["masking.masked_patches=6", "global_batch=8", "micro_batch=8"]


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """What the command prints, and its JSON."""

    def run(*words: str, code: int = 0) -> tuple[str, Any]:
        file = tmp_path / "plan.json"
        assert main([*words, "--json", str(file)]) == code
        return capsys.readouterr().out, json.loads(file.read_text())

    return run


@pytest.fixture
def measured_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU of which all is known."""
    monkeypatch.setattr(devices, "product_rate", lambda precision: 1e11)
    monkeypatch.setattr(devices, "copy_rate", lambda: 1e10)


@pytest.mark.parametrize("recipe", [*shipped("pretraining"), *shipped("finetuning"), *shipped("tokenizer")])
def test_every_recipe_is_planned_in_80_columns(recipe: str, plan: Plan) -> None:
    kind = kind_of(None, recipe)
    words = ["--classes", "150"] if kind == "finetuning" else []
    text, facts = plan("--config", recipe, "--gpus", "2", "--samples", "1000000", *words, "data=null")
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 50
    assert facts["recommended"]["memory_total"] == sum(facts["recommended"]["memory"].values())
    assert [stage["stage"] for stage in facts["stages"]] == [0, 1, 2, 3]
    assert f"--ds_config zero{facts['recommended']['stage']}" in text
    assert f"{facts['parameters']:,} parameters" in text
    assert facts["kind"] in text


def test_the_screen_says_what_json_does(plan: Plan) -> None:
    words = ("--config", "beit_base_22k", "--gpus", "64", "--gpu", "h100", "--samples", "14200000", "compile=true")
    text, facts = plan(*words)
    best = facts["recommended"]
    assert f"{1000 * best['step_seconds']:.3g} ms: compute" in text
    assert f"{best['images_per_second']:,.0f}" in text
    assert f"for {facts['steps']:,} steps" in text
    assert "2.19 TB" in text
    assert facts["view_bytes"] == pytest.approx(14_200_000 * 154_112, rel=1e-3)
    assert facts["gpu_hours"] == pytest.approx(facts["seconds"] * 64 / 3600)
    assert [limit["gpus"] for limit in facts["limits"]] == sorted(limit["gpus"] for limit in facts["limits"])
    assert "measured: base through the trainer" in " ".join(text.split())
    assert best["step_seconds"] == pytest.approx(best["compute_seconds"] + best["exposed_seconds"])


def test_json_alone_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "beit_tiny", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] is None


def test_options_are_taken(plan: Plan) -> None:
    words = ["--config", "beit_base", "--gpus", "16", "--samples", "1281167"]
    _, usual = plan(*words)
    _, slow = plan(*words, "--network", "1")
    assert slow["recommended"]["exposed_seconds"] > usual["recommended"]["exposed_seconds"]
    _, starved = plan(*words, "--storage-bandwidth", "0.5")
    assert starved["recommended"]["step_seconds"] == starved["recommended"]["data_seconds"]
    _, half = plan(*words, "--mfu", "0.1")
    assert half["recommended"]["mfu"] == {"value": 0.1, "source": "given: --mfu"}
    text, _ = plan(*words, "--per-node", "4")
    assert "4 nodes of up to 4" in text
    _, views = plan(*words, "--views", "3")
    assert views["view_bytes"] == 3 * usual["view_bytes"]
    text, _ = plan(*words)
    assert "kWh" not in text
    text, facts = plan(*words, "--price-per-gpu-hour", "2")
    assert f"{2 * facts['gpu_hours']:,.0f} at 2 an hour" in " ".join(text.split())
    assert "kWh" in text


def test_samples_and_views_are_those_of_the_data(
    tmp_path: Path, make_shards: Callable[..., Manifest], plan: Plan
) -> None:
    manifest = make_shards(tmp_path / "d", [9, 8], views=2)
    _, facts = plan("--config", "beit_tiny", f"data={tmp_path / 'd'}", "epochs=4", *SMALL)
    assert facts["samples"] == 17
    assert facts["steps"] == 9
    assert facts["view_bytes"] >= sum(shard.bytes for shard in manifest.shards) - 2 * 10_240


def test_a_sweep_has_a_line_for_each_number(plan: Plan) -> None:
    words = ("--config", "beit_base", "--sweep", "1,3,8,64", "--samples", "1281167")
    text, facts = plan(*words)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:] if not line.startswith("        ")] == ["1", "3", "8", "64"]
    assert "expected a multiple of the 3 ranks" in text
    assert [entry["gpus"] for entry in facts] == [1, 3, 8, 64]
    steps = [entry["recommended"]["step_seconds"] for entry in facts if "recommended" in entry]
    assert steps == sorted(steps, reverse=True)


def test_too_little_memory_is_exit_code_1(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "USABLE", 0.001)
    text, facts = plan("--config", "beit_large", code=1)
    assert facts["recommended"] is None
    assert "nothing: use more GPUs" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "v100"], "--gpu: got 'v100', expected one of h100, h200, a100, cpu"),
        (["--mfu", "1.5"], "--mfu: got 1.5, expected a share"),
        (["--network", "fast"], "--network: got 'fast', expected a number above 0"),
        (["--gpus", "3"], "expected a multiple of the 3 ranks"),
        (["--sweep", "1,x"], "--sweep: got 'x', expected a whole number, 1 or more"),
        (["--measured", "nowhere"], "--measured: got 'nowhere', expected a run folder"),
        (["--config", "finetune_small", "data=null"], "--classes: got None, expected the number of classes"),
        (["--config", "beit_bass"], "Did you mean beit_base"),
    ],
)
def test_what_is_wrong_is_refused(words: list[str], said: str) -> None:
    words = words if "--config" in words else ["--config", "beit_base", *words]
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        main(words)


def test_the_kind_follows_from_the_files_name_unless_it_is_said() -> None:
    assert kind_of(None, "beit_base") == kind_of(None, None) == "pretraining"
    assert kind_of(None, "some/where/finetune_mine.yaml") == "finetuning"
    assert kind_of(None, "tokenizer_small") == "tokenizer"
    assert kind_of("finetuning", "mine.yaml") == "finetuning"


# ------------------------------------------------------------------------------------------------------- measured


def record(folder: Path, lines: list[dict[str, Any]], **settings: Any) -> Path:
    """A run folder of two ranks as a start would leave it."""
    words = [*SMALL, "model.width=32", "model.depth=2", "model.heads=2", f"run={folder}"]
    task = task_from("pretraining", "beit_tiny", [*words, "checkpoint.every_steps=3", "precision=fp32"])
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(task.config.model_dump(mode="json")))
    ranks = [{"rank": rank, "host": "one", "pid": 1} for rank in range(2)]
    facts = {"attempt": 2, "world_size": 2, "ranks": ranks, "kind": "pretraining", "stage": 1, "precision": "fp32"}
    (folder / "run.json").write_text(json.dumps(facts | settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    step = folder / "checkpoints" / "step-00000003.a0001"
    step.mkdir(parents=True)
    files = [{"file": "rank-00000.safetensors", "bytes": 4000}, {"file": "rank-00000.json", "bytes": 9}]
    (step / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def line(step: int, time: float, speed: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "attempt": 2, "time": time, "images_per_second": speed, **more}


STEPS = [
    {"step": 1, "attempt": 1, "time": 1.0, "images_per_second": 1.0},  # of an earlier start
    line(1, 100.0, 0.8),  # which warms up
    *(line(step, 104.0, 4.0, data_wait=0.25, peak_memory=7000) for step in (2, 3)),
    *(line(step, 109.5, 4.0, data_wait=0.25, peak_memory=9000) for step in (4, 5)),  # 4 s of steps, 1.5 of a save
    *(line(step, 113.5, 4.0, data_wait=0.35, peak_memory=8000) for step in (6,)),
]


def test_a_recorded_run_is_read_as_it_was(tmp_path: Path) -> None:
    found = recorded_run(str(record(tmp_path / "run", STEPS)))
    assert (found.ranks, found.per_node, found.stage, found.precision) == (2, 2, 1, "fp32")
    assert (found.step, found.steps) == (2.0, 5)
    assert (found.wait, found.memory, found.saved, found.stall) == (0.25, 9000, 4000, 1.5)


def test_what_a_run_did_not_record_is_said(
    tmp_path: Path, measured_cpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(tmp_path / "run", [line(1, 1.0, 2.0), line(2, 5.0, 2.0)])
    assert main(["--measured", str(folder), "--gpu", "cpu"]) == 0
    assert capsys.readouterr().out.count("not recorded") == 3  # data wait, memory, and no save


def test_predicted_measured_and_ratio_are_printed(tmp_path: Path, measured_cpu: None, plan: Plan) -> None:
    folder = record(tmp_path / "run", STEPS)
    text, (facts,) = plan("--measured", str(folder), "--gpu", "cpu", "--mfu", "0.5")
    assert max(map(len, text.splitlines())) <= 80
    rows = {row["name"]: row for row in facts["rows"]}
    assert rows["step"]["ratio"] == pytest.approx(2.0 / rows["step"]["predicted"])
    assert rows["speed"]["ratio"] == pytest.approx(1 / rows["step"]["ratio"])
    assert facts["mfu"]["source"] == "given: --mfu"
    task = task_from("pretraining", str(folder / "config.yaml"), [])
    assert rows["checkpoint"]["predicted"] == size_of_checkpoint(task)
    assert f"{rows['step']['ratio']:.2f}" in text


def test_a_run_that_has_recorded_nothing_is_refused(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", STEPS[:1])
    with pytest.raises(ConfigError, match="a run whose last start has recorded steps"):
        main(["--measured", str(folder), "--gpu", "cpu"])


@pytest.mark.slow
def test_a_real_run_is_held_against_its_plan(new_run: Callable[..., Run], plan: Plan) -> None:
    run = new_run("run", ranks=2, overrides=["epochs=2", "loader.workers=0"])
    code, output = run.finish()
    assert code == 0, output
    _, (facts,) = plan("--measured", str(run.folder), "--gpu", "cpu")
    rows = {row["name"]: row for row in facts["rows"]}
    assert facts["run"]["ranks"] == facts["run"]["per_node"] == 2
    assert rows["checkpoint"]["ratio"] == pytest.approx(1, rel=0.2)  # the file's own header is counted, too
    assert all(rows[name]["measured"] > 0 for name in ("step", "speed", "memory"))
    assert 0 <= rows["data wait"]["measured"] <= 1
    assert rows["stall"]["measured"] is not None
