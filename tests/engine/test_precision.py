"""The machine decides the precision, once for all ranks, unless one is named; every start says which and why."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine import precision
from beit_dist.engine.precision import choose, decide, settle_alone
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.resolve import Resolved, read_ds_config, resolve
from beit_dist.engine.resume import newest_saved
from beit_dist.errors import ConfigError

DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"
CPU = torch.device("cpu")
FAST, SLOW, OLD_GPU = {"bf16": 8.0}, {"bf16": 0.03}, {"fp16": 5.0}
NEW_GPU = {"bf16": 16.0, "fp16": 16.0}


def resolved(precision: str, ds: Mapping[str, Any] | str = "zero1.json", *overrides: str) -> Resolved:
    recipe = load_recipe(PretrainingConfig, None, ["run=r", f"precision={precision}", *overrides])
    return resolve(recipe, read_ds_config(DEEPSPEED / ds) if isinstance(ds, str) else ds, 1)


@pytest.mark.parametrize("name", ["zero1.json", "zero2.json", "zero3.json"])
def test_shipped_files_defer_to_the_recipe_and_deepspeed_sees_booleans(name: str) -> None:
    for asked in ("fp32", "bf16", "fp16"):
        run = resolved(asked, name)
        assert (run.precision, run.why) == (asked, "from the recipe")
        assert run.deepspeed["bf16"]["enabled"] is (asked == "bf16")
        assert run.deepspeed.get("fp16", {"enabled": False})["enabled"] is (asked == "fp16")
    undecided = resolved("auto", name)
    assert undecided.precision == "auto"
    for chosen in ("fp32", "bf16", "fp16"):
        assert undecided.settled(chosen, "").deepspeed == resolved(chosen, name).deepspeed


def test_where_fp16_is_chosen_its_scaler_is_filled_in_around_what_the_json_has() -> None:
    ds = {"zero_optimization": {"stage": 1}, "fp16": {"initial_scale_power": 12}}
    fp16 = resolved("fp16", ds).deepspeed["fp16"]
    assert fp16["enabled"] is True
    assert (fp16["loss_scale"], fp16["initial_scale_power"], fp16["loss_scale_window"]) == (0, 12, 1000)


def test_zero0_stays_fp32() -> None:
    assert resolved("auto", "zero0.json").precision == "fp32"
    silent = resolved("auto", {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}})
    assert silent.precision == "fp32"
    assert "stage 0" in silent.why


@pytest.mark.parametrize(
    ("asked", "ds"),
    [
        ("fp32", {"bf16": {"enabled": True}}),
        ("bf16", {"bf16": {"enabled": False}}),
        ("fp16", {"bf16": {"enabled": True}}),
        ("bf16", {"fp16": {"enabled": True}}),
        ("fp16", {"fp16": {"enabled": False}}),
        ("fp16", {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}),
    ],
)
def test_a_conflict_of_recipe_and_json_is_refused(asked: str, ds: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=rf"precision: got '{asked}', expected .* as --ds_config has it, or auto"
    ):
        resolved(asked, {"zero_optimization": {"stage": 1}, **ds})


def test_a_json_that_names_a_precision_decides_for_auto() -> None:
    for ds, expected in (
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, "fp16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "bf16"),
    ):
        assert resolved("auto", {"zero_optimization": {"stage": 1}, **ds}).precision == expected


@pytest.mark.parametrize(
    ("found", "expected", "why"),
    [
        ([FAST], "bf16", "8 times as fast as fp32 here"),
        ([SLOW], "fp32", "33 times slower than fp32 here"),
        ([{"bf16": 1.29}], "fp32", "1.3 times as fast"),
        ([{"bf16": 1.3}], "bf16", "1.3 times as fast"),
        ([NEW_GPU, NEW_GPU], "bf16", "16 times"),
        ([OLD_GPU], "fp16", "fp16 is 5 times"),
        ([NEW_GPU, OLD_GPU], "fp16", "rank 1 (host-1)"),
        ([NEW_GPU, SLOW], "fp32", "rank 1 (host-1)"),
        ([{"fp16": 0.02}], "fp32", "50 times slower"),
    ],
)
def test_auto_is_the_lowest_that_any_rank_does_well(
    found: list[dict[str, float]], expected: str, why: str
) -> None:
    decision = choose("auto", "", None, [(f"host-{rank}", speeds) for rank, speeds in enumerate(found)])
    assert decision.precision == expected
    assert why in decision.why


@pytest.mark.parametrize(("asked", "saved", "measured", "taken", "said"), [
    ("auto", "bf16", SLOW, "bf16", "33 times slower than fp32 here: precision=fp32 would be faster"),
    ("auto", "fp32", FAST, "fp32", "8 times as fast as fp32 here: precision=bf16 would be faster"),
    ("auto", "bf16", FAST, "bf16", ""),
    ("bf16", None, SLOW, "bf16", "33 times slower"),
    ("fp32", "bf16", FAST, "fp32", "changed on resume: precision was bf16, now fp32"),
    ("bf16", "bf16", FAST, "bf16", ""),
])  # fmt: skip
def test_a_resumed_run_keeps_its_precision_unless_one_is_named_and_says_what_is_slow(
    joined: torch.device, asked: str, saved: str | None, measured: dict[str, float], taken: str, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(precision, "speeds", lambda device, *wanted: measured)
    decision = decide(asked, "from the recipe", saved, Agreement(Ranks(), timedelta(seconds=60)), joined)
    printed = capsys.readouterr()
    assert decision.precision == taken
    assert said in printed.out + printed.err
    assert ("warning:" in printed.err) is ("faster" in said or "slower" in said)
    assert ("changed on resume" in printed.out) is (saved not in (None, taken))


@pytest.mark.parametrize(
    ("saved", "found", "excluded", "expected"),
    [
        ("fp16", [SLOW], (), "fp32"),  # on a CPU, of which nobody computes in it
        ("fp16", [OLD_GPU, {}], (), "fp32"),  # one rank's device does not
        ("fp16", [OLD_GPU], ("fp16",), "fp32"),  # a tokenizer that goes without its scaler
        ("fp16", [OLD_GPU], (), "fp16"),
        (None, [NEW_GPU], ("bf16",), "fp16"),
    ],
)
def test_auto_never_stands_for_what_a_rank_lacks_or_the_settings_exclude(
    saved: str | None, found: list[dict[str, float]], excluded: tuple[str, ...], expected: str
) -> None:
    assert choose("auto", "", saved, [("host", speeds) for speeds in found], excluded).precision == expected


def test_a_precision_that_a_gpu_emulates_is_warned_about() -> None:
    """bf16 on a GPU without units for it, named or from a checkpoint of another."""
    for asked, saved in (("bf16", None), ("auto", "bf16")):
        assert "bf16 is 4 times slower than fp32 here" in choose(asked, "", saved, [("", {"bf16": 0.25})]).advice


def test_dry_run_says_what_a_run_would_take_and_what_is_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(precision, "speeds", lambda device, *wanted: SLOW)
    new = settle_alone(resolved("auto"), None)
    assert (new.precision, new.why) == ("fp32", "auto: bf16 is 33 times slower than fp32 here")
    assert new.deepspeed["bf16"]["enabled"] is False
    assert "precision=fp32 would be faster" in settle_alone(resolved("bf16"), None).why
    assert "precision=fp32 would be faster" in settle_alone(resolved("auto"), "bf16").why
    assert newest_saved(str(tmp_path / "none")) is None


def test_an_accumulation_of_auto_is_the_precisions_and_nothing_that_deepspeed_sees() -> None:
    ds = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "auto"}}
    run = resolved("bf16", ds)
    assert run.accumulation_type == "bf16"
    assert "data_types" not in run.deepspeed
    with pytest.raises(ConfigError, match="grad_accum_dtype: got 'fp16', expected fp32, as"):
        resolved("auto", {**ds, "fp16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp16"}})


@pytest.mark.slow
def test_what_is_measured_is_what_the_processor_does() -> None:
    """oneDNN held to AVX2 computes bf16 in software, on any machine."""
    program = (
        "import torch; from beit_dist.engine.precision import choose, speeds;"
        "print(choose('auto', '', None, [('', speeds(torch.device('cpu')))]))"
    )
    environment = {**os.environ, "DNNL_MAX_CPU_ISA": "AVX2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("fp32 (auto: bf16 is "), said.stdout
    assert "slower than fp32 here" in said.stdout


@pytest.mark.slow
def test_two_ranks_decide_alike_and_run_json_says_what_and_why(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    run = new_run("run", ranks=2, overrides=["precision=auto", "steps=6"], forked=False)
    code, output = run.finish()
    assert code == 0, output
    assert len(re.findall(r"^precision +fp32 \(auto: bf16 is ", output, re.MULTILINE)) == 1
    facts = run.facts()
    assert facts["precision"] == "fp32"
    assert facts["precision_why"].startswith("auto: bf16 is ")
    saved = newest_saved(str(run.folder))
    assert saved is not None
    assert saved.manifest["precision"] == "fp32"

    code, output = run.finish("precision=bf16", "steps=7")  # the only step in bf16: emulated, it takes long
    assert code == 0, output
    assert "changed on resume: precision was fp32, now bf16" in output
    assert "slower than fp32" in output
    manifests = (run.folder / "checkpoints").glob("step-00000007.*/manifest.json")
    assert [json.loads(path.read_text())["precision"] for path in manifests] == ["bf16"]
