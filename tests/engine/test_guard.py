"""No update from a number that is not finite, and who made it is named; spikes and differing ranks are seen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.config.run import GuardConfig
from beit_dist.engine.guard import KEPT_STEPS, Guard, LossWindow, digest
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.errors import TrainingError

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"


def level(count: int, seed: int = 0) -> list[float]:
    """Losses around 5 with a spread of 0.1."""
    return (5 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


class Several(Agreement):
    """All ranks' answers, given beforehand."""

    def __init__(self, answers: list[Any] | None = None) -> None:
        super().__init__(Ranks(), timedelta(seconds=1))
        self._answers = answers

    def gather(self, value: Any) -> list[Any]:
        return [value] if self._answers is None else [value, *self._answers]


def guard(answers: list[Any] | None = None, **settings: Any) -> Guard:
    settings = {"window": 20, **settings}
    saved = settings.pop("saved", None)
    return Guard(GuardConfig(**settings), Several(answers), nn.Linear(2, 2), whole=True, saved=saved)


def test_a_loss_far_above_a_full_window_is_a_spike_and_nothing_else_is() -> None:
    window = LossWindow(20, 12.0)
    assert not any(window.is_spike(loss) for loss in [100.0, *level(19)])  # not full: no judgement
    assert not any(window.is_spike(loss) for loss in level(200, seed=1))
    assert not window.is_spike(0.1)  # downwards is what training is for
    assert window.is_spike(9.0)
    assert not window.is_spike(5.2)


def test_a_new_level_becomes_normal_and_equal_losses_have_a_spread() -> None:
    window = LossWindow(20, 12.0, [5.0] * 20)
    assert not window.is_spike(5.01)
    judged = [window.is_spike(6.0) for _ in range(20)]
    assert judged[0]
    assert not judged[-1]


def test_a_continued_window_judges_as_the_one_that_was_not_interrupted() -> None:
    losses = level(120)
    losses[70] = 7.0
    whole, first = LossWindow(20, 8.0), LossWindow(20, 8.0)
    expected = [whole.is_spike(loss) for loss in losses]
    judged = [first.is_spike(loss) for loss in losses[:65]]
    second = LossWindow(20, 8.0, json.loads(json.dumps(first.losses)))
    judged += [second.is_spike(loss) for loss in losses[65:]]
    assert judged == expected
    assert sum(expected) == 1


@pytest.mark.parametrize(("spikes", "warns", "stops"), [("off", 0, 0), ("warn", 1, 0), ("stop", 1, 1)])
def test_a_spike_does_what_the_setting_says(
    spikes: str, warns: int, stops: int, caplog: pytest.LogCaptureFixture
) -> None:
    ours = guard(spikes=spikes)
    for step, loss in enumerate([*level(30), 9.0], start=1):
        ours.fetched({"step": step, "loss": loss})
    ours.fetched({"step": 32, "loss": None})
    assert len(caplog.records) == warns
    assert bool(ours.alarm) == bool(stops)
    if stops:
        assert re.match(r"step 31 has a loss of 9.0000.* median of (4\.9|5\.0)", str(ours.alarm))


def test_a_stop_for_a_spike_is_not_forgotten_by_a_restart_but_can_be_overruled() -> None:
    first = guard(spikes="stop")
    for step, loss in enumerate([*level(30), 9.0], start=1):
        first.fetched({"step": step, "loss": loss})
    saved = json.loads(json.dumps(first.state))
    assert guard(spikes="stop", saved=saved).alarm
    assert not guard(spikes="warn", saved=saved).alarm
    assert guard(spikes="warn", saved=saved).state["spikes"] == 1


def test_off_in_yaml_is_off(tmp_path: Path) -> None:
    assert load_recipe(PretrainingConfig, None, ["run=r", "guard.spikes=off"]).guard.spikes == "off"


def test_who_and_what_was_not_finite_is_named() -> None:
    other = {"step": 9, "rank": 1, "host": "b", "samples": list(range(40))}
    ours = guard(answers=[[other]])
    for step in range(1, 10):
        bad = torch.tensor(float("inf") if step == 9 else 1.0)
        ours.note(step, [torch.tensor(1.0), bad], torch.tensor([10, 11, 12, -1]))
    text, details = ours.blame()
    assert "In step 9 the loss was not finite on rank 0 (" in text
    assert "samples 12; on rank 1 (b), samples 0, 1, 2" in text
    assert "and 24 more" in text
    assert details[0]["samples"] == [12]  # a damaged sample's row has weight 0
    assert details[1] == other


def test_without_a_bad_loss_the_gradients_are_blamed_and_only_the_last_steps_are_kept() -> None:
    ours = guard()
    for step in range(1, 9):
        ours.note(step, [torch.tensor(float("nan") if step <= 8 - KEPT_STEPS else 1.0)], torch.tensor([step]))
    text, details = ours.blame()
    assert "finite on every rank" in text
    assert details == []


def test_sample_ids_are_copied_since_the_loader_uses_its_memory_again() -> None:
    ours, ids = guard(), torch.tensor([7])
    ours.note(1, [torch.tensor(float("nan"))], ids)
    ids.fill_(8)
    assert "samples 7" in ours.blame()[0]


def test_a_digest_sees_one_bit_a_swap_and_a_zero_sign() -> None:
    for kind in (torch.float32, torch.bfloat16):
        model = nn.Linear(3, 3).to(kind)
        nn.init.trunc_normal_(model.weight, generator=torch.Generator().manual_seed(0))
        seen = {digest(model)}
        with torch.no_grad():
            weight = model.weight.view(-1)
            weight[4] = torch.nextafter(weight[4].float(), torch.tensor(9.0)) if kind == torch.float32 else 2.0
            seen.add(digest(model))
            weight[:2] = weight[:2].flip(0).clone()
            seen.add(digest(model))
            model.bias[0] = 0.0
            seen.add(digest(model))
            model.bias[0] = -0.0
            seen.add(digest(model))
        assert len(seen) == 5
        assert digest(model) in seen


def test_a_rank_with_other_weights_is_named() -> None:
    ours = guard(check_parameters_every_steps=2)
    own = digest(ours._module)
    ours._agreement = Several([own, (1, 2), own])
    ours.check_parameters(1)
    with pytest.raises(TrainingError, match="after step 2 rank 2 holds different weights from the other 3"):
        ours.check_parameters(2)


def test_at_stage_3_the_comparison_is_left_out_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    settings = GuardConfig(check_parameters_every_steps=1)
    ours = Guard(settings, Several([(1, 2)]), nn.Linear(2, 2), whole=False)
    ours.check_parameters(1)
    assert "skipped, because at ZeRO stage 3" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [{"stage": 0}, {"stage": 1, "bf16": True}, {"stage": 2}, {"stage": 3, "bf16": True}]
)
def test_a_nan_on_one_rank_changes_no_parameter_on_any_and_its_maker_is_named(
    new_run: Callable[..., Any], stage: dict[str, Any]
) -> None:
    """Rank 1's loss is NaN in its second micro-batch of steps 3 and 4 and of all from 6 on; 2 in a row may be."""
    settings: dict[str, Any] = {"zero_optimization": {"stage": stage["stage"]}}
    if stage.get("bf16"):
        settings |= {"bf16": {"enabled": True}}
        settings |= {"data_types": {"grad_accum_dtype": "fp32"}} if stage["stage"] == 1 else {}
    overrides = ["steps=12", "loader.workers=0", "checkpoint.every_steps=1", "checkpoint.keep=20"]
    overrides += ["max_skipped_in_a_row=3", "guard.check_parameters_every_steps=1"]
    run = new_run("run", settings, ranks=2, overrides=overrides)
    run.entry = run.folder.parent / "nan.py"
    run.entry.write_text(
        "import os, runpy\n"
        "from prometheus_client import generate_latest\n"
        "from beit_dist.engine.guard import Guard\n"
        "from beit_dist.models.mim import MaskedImageModel\n"
        "blame = Guard.blame\n"
        "def blaming(self):\n"
        "    if self._metrics: print(generate_latest(self._metrics.registry).decode(), flush=True)\n"
        "    return blame(self)\n"
        "Guard.blame = blaming\n"
        "forward, calls = MaskedImageModel.forward, [0]\n"
        "def poisoned(self, *inputs, **named):\n"
        "    output = forward(self, *inputs, **named)\n"
        "    step, micro = calls[0] // 2 + 1, calls[0] % 2\n"
        "    calls[0] += 1\n"
        "    if os.environ['RANK'] == '1' and micro == 1 and (step in (3, 4) or step >= 6):\n"
        "        output = (output[0] * float('nan'), *output[1:])\n"
        "    return output\n"
        "MaskedImageModel.forward = poisoned\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    code, output = run.finish()
    assert code == 1, output
    expected = [False, False, True, True, False, True, True, True]
    assert [line["skipped"] for line in run.lines()] == expected, output

    def manifest(step: int) -> dict[str, Any]:
        (found,) = run.folder.glob(f"checkpoints/step-{step:08d}.*/manifest.json")
        read: dict[str, Any] = json.loads(found.read_text())
        return read

    def tensors(step: int) -> list[str]:
        return [file["sha256"] for file in manifest(step)["files"] if file["file"].endswith(".safetensors")]

    assert tensors(1) != tensors(2) == tensors(3) == tensors(4) != tensors(5) == tensors(6)
    assert len(tensors(1)) == 2
    assert [manifest(step)["counters"]["skipped"] for step in range(1, 7)] == [0, 0, 1, 2, 2, 3]
    assert [manifest(step)["updates"] for step in range(1, 7)] == [1, 2, 2, 2, 3, 3]
    assert "beit_train_steps_skipped_total 5.0" in output

    failed = json.loads((run.folder / "FAILED").read_text())
    assert "3 steps in a row up to step 8" in failed["error"]
    assert "In step 8 the loss was not finite on rank 1 (" in failed["error"]
    assert failed["error"] in output
    assert {(fault["step"], fault["rank"], len(fault["samples"])) for fault in failed["details"]} == {
        (6, 1, 4), (7, 1, 4), (8, 1, 4)
    }  # fmt: skip
    assert "Traceback" not in output
