"""The formulas of a plan: hand-computed values, the engine's counts, the figures of docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.commands.plan import stages, task_from
from beit_dist.config.masking import MaskingConfig
from beit_dist.config.model import ModelConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.memory import count_parameters, training_bytes
from beit_dist.engine.resolve import resolve
from beit_dist.errors import ConfigError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.planning.communication import HOP, REACHED, Exchange, exchanges
from beit_dist.planning.compute import KERNELS, LAUNCH, compute, update_seconds
from beit_dist.planning.devices import GB, GIB, GPUS, Figure, device_named
from beit_dist.planning.efficiency import CPU, H100, LARGE, efficiency
from beit_dist.planning.limits import OPEN_FILES, files_of_rank_0, limits
from beit_dist.planning.memory import attention_bytes, memory
from beit_dist.planning.plan import Plan, Question, make_plan, resolved_for
from beit_dist.planning.storage import checkpoint, reading, view_bytes
from beit_dist.shards.manifest import Manifest
from beit_dist.tasks.pretraining.task import Pretraining

STAGES = stages()
H = GPUS["h100"]
NO_CPU = replace(H, name="cpu", to_host=17 * GB)


def task(*overrides: str, recipe: str | None = "beit_base") -> Any:
    return task_from("pretraining", recipe, overrides)


def planned(gpus: int, *overrides: str, recipe: str = "beit_base", **question: Any) -> Plan:
    asked = Question(gpus=gpus, per_node=8, device=question.pop("device", H), **question)
    return make_plan(task(*overrides, recipe=recipe), STAGES, asked)


def images(plan: Plan) -> float:
    assert plan.best is not None
    return plan.best.resolved.rank_batch * plan.question.gpus / plan.best.step


# ----------------------------------------------------------------------------------- what was measured


@pytest.mark.parametrize(
    ("overrides", "measured"),
    [(["compile=true"], 2562), (["compile=false"], 2090)],
)
def test_base_on_an_h100_is_within_2_percent_of_what_was_measured(overrides: list[str], measured: float) -> None:
    plan = planned(1, *overrides, "global_batch=256", "micro_batch=256")
    assert images(plan) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("overrides", "bare"), [(["compile=true"], 916), (["compile=false"], 785)])
def test_large_through_the_trainer_is_a_little_slower_than_it_was_measured_bare(
    overrides: list[str], bare: float
) -> None:
    plan = planned(1, *overrides, "global_batch=128", "micro_batch=128", recipe="beit_large")
    assert 0.90 * bare < images(plan) < bare


@pytest.mark.parametrize("compiled", [True, False])
def test_the_law_leads_from_base_to_large_within_5_percent(compiled: bool) -> None:
    other = replace(H, name="h200")  # an H100 in all but its name, so that no measured figure is taken
    by_law = efficiency(other, "bf16", 1024, compiled, None)
    assert by_law.source.startswith("assumed")
    assert by_law.value == pytest.approx(LARGE[compiled][0], rel=0.05)


def test_the_law_leads_from_base_to_tiny_on_a_cpu() -> None:
    tiny = efficiency(NO_CPU, "fp32", 192, False, None)
    assert tiny.source.startswith("measured")
    assert CPU.mfu / (CPU.products + (1 - CPU.products) * 4) == pytest.approx(tiny.value, rel=0.01)


def test_a_step_of_base_is_saved_as_fast_as_it_was_measured() -> None:
    config = task().config
    size = 1_103_589_312  # bytes, fp32 weights and two moments of 91,965,776
    save = checkpoint(config, size, 1, NO_CPU, None, 1.0)
    assert 0.061 < save.stall < 0.085  # 0.063 s on the path of 17 GB/s, of which a copy is assumed to reach 0.8
    assert size / save.write == pytest.approx(1.5 * GB)


# --------------------------------------------------------------------------------------------- devices


def test_an_unknown_device_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match="--gpu: got 'v100', expected one of h100, h200, a100, cpu"):
        device_named("v100", 8)


def test_ranks_of_a_cpu_share_its_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit_dist.planning.devices.product_rate", lambda precision: 1e12)
    monkeypatch.setattr("beit_dist.planning.devices.copy_rate", lambda: 1e10)
    monkeypatch.setattr("beit_dist.planning.devices.free_host_memory", lambda: 64 * GIB)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for ranks, share in ((1, 1.0), (4, 1.0), (8, 0.5)):
        device = device_named("cpu", ranks)
        assert device.peaks["fp32"] == share * 1e12
        assert device.memory_rate == share * 1e10
        assert device.memory == 64 * GIB / ranks


def test_figures_say_where_they_come_from() -> None:
    assert efficiency(H, "bf16", 768, True, 0.4) == Figure(0.4, "given: --mfu")
    assert efficiency(H, "bf16", 768, True, None).source.startswith("measured")
    assert efficiency(H, "fp32", 768, True, None).source.startswith("assumed")
    assert efficiency(GPUS["a100"], "bf16", 768, True, None).source.startswith("assumed")
    assert efficiency(H, "bf16", None, True, None).source.startswith("assumed")
    assert all(device.source.startswith("datasheet") for device in GPUS.values())


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280])
def test_no_share_is_beyond_the_peak_and_wider_blocks_reach_more(name: str, precision: str, width: int) -> None:
    def of(width: int) -> float:
        return efficiency(replace(GPUS[name], name="another"), precision, width, True, None).value

    assert 0 < of(width) < of(2 * width) < 1


# --------------------------------------------------------------------------------------------- compute


def test_arithmetic_is_flops_over_peak_and_share() -> None:
    found = compute(10**9, 4, H, "bf16", Figure(0.5, ""), depth=0, compiled=True, recompute=False)
    assert found.arithmetic == pytest.approx(6e9 * 4 / (989.4e12 * 0.5))
    again = compute(10**9, 4, H, "bf16", Figure(0.5, ""), depth=0, compiled=True, recompute=True)
    assert again.arithmetic == pytest.approx(found.arithmetic * 4 / 3)


def test_no_micro_batch_takes_less_than_starting_its_kernels() -> None:
    found = compute(10**6, 1, H, "bf16", Figure(0.5, ""), depth=12, compiled=False, recompute=False)
    assert found.seconds == found.launches == pytest.approx(12 * KERNELS[False] * LAUNCH)
    assert found.backward == pytest.approx(found.seconds * 2 / 3)


# --------------------------------------------------------------------------------------- communication


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    # payload in bytes a parameter, and how often in a step of 2 micro-batches
    [
        (0, "fp32", {"all-reduce": (4, 1)}),
        (1, "fp32", {"all-reduce": (4, 1), "all-gather": (4, 1)}),
        (1, "bf16", {"all-reduce": (2, 1), "all-gather": (2, 1)}),
        (2, "bf16", {"all-reduce": (2, 2), "all-gather": (2, 1)}),
        (3, "bf16", {"all-gather": (2, 2), "reduce-scatter": (2, 2)}),
    ],
)
def test_what_is_exchanged_by_stage(stage: int, precision: str, expected: dict[str, tuple[int, int]]) -> None:
    config = task("global_batch=16", "micro_batch=4", f"precision={precision}").config
    found = list(exchanges(resolve(config, STAGES[stage], 2), 1000, cpu=False))
    assert {each.kind: (each.payload / 1000, each.times) for each in found} == expected
    assert {each.hidden for each in found} == {stage == 3}


def test_the_slowest_link_sets_the_pace() -> None:
    exchange = Exchange("all-reduce", 8 * GB, 1, 1, False)
    within = exchange.seconds(8, 8, H)
    assert within == pytest.approx(2 * 7 / 8 * 8 / (REACHED * 450) + HOP)
    between = exchange.seconds(64, 8, replace(H, network=25 * GB))
    assert between == pytest.approx(2 * 63 / 64 * 8 / (REACHED * 25) + 4 * HOP)
    assert exchange.seconds(1, 8, H) == 0
    assert Exchange("all-gather", 8 * GB, 1, 1, False).sent(8) == exchange.sent(8) / 2


def test_what_overlaps_is_hidden_up_to_the_backward_pass() -> None:
    slow = Question(gpus=16, per_node=8, device=replace(H, network=1 * GB))
    plan = make_plan(task(), STAGES, slow)
    by_stage = {each.stage: each.choice for each in plan.stages}
    third = by_stage[3]
    assert third is not None
    assert third.exposed == pytest.approx(third.communication - third.resolved.accumulation * third.micro.backward)
    fast = make_plan(task(), STAGES, replace(slow, device=H))
    assert next(each.choice for each in fast.stages if each.stage == 3).exposed == pytest.approx(0)  # type: ignore[union-attr]
    first = by_stage[1]
    assert first is not None
    assert first.exposed == first.communication > 0


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_the_engines_own_count(stage: int) -> None:
    of = task("ema.decay=0.999")
    resolved = resolved_for(of, STAGES[stage], 8, H)
    parts = memory(of, resolved, H, recompute=False).parts
    state = training_bytes(of, resolved)
    assert {name: parts[name] for name in state} == state
    assert "average" in state
    assert parts["activations"] + parts["logits"] == of.activation_bytes(resolved)


def test_recomputing_is_counted_as_the_recipes_setting_is() -> None:
    of, recomputing = task(), task("activation_checkpointing=true")
    resolved = resolved_for(of, STAGES[1], 8, H)
    found = memory(of, resolved, H, recompute=True)
    assert found.parts["activations"] + found.parts["logits"] == recomputing.activation_bytes(resolved)
    assert found.total < memory(of, resolved, H, recompute=False).total
    assert not of.config.activation_checkpointing


def test_on_a_cpu_each_block_keeps_its_softmax() -> None:
    model = ModelConfig(width=32, depth=3, heads=2, image_size=32, patch_size=8, vocabulary=64)
    network = MaskedImageModel(model)
    network.initialise(0)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (17, 17) and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(
            torch.zeros(4, 16, 192, dtype=torch.uint8),
            torch.zeros(4, 16, dtype=torch.int16),
            torch.zeros(4, 6, dtype=torch.int16),
            torch.ones(4, 3, 2, dtype=torch.bool),
        )
    masking = MaskingConfig(min_block=4)
    config = PretrainingConfig(
        run="r", model=model, masking=masking, global_batch=4, micro_batch=4, precision="fp32"
    )
    counted = attention_bytes(Pretraining(config), resolve(config, STAGES[0], 1), NO_CPU, recompute=False)
    assert len(kept) == model.depth
    one_block = 4 * 2 * 17 * 17 * 4
    assert counted - 2 * one_block == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_hold_less_each(stage: int) -> None:
    sizes = []
    for gpus in (1, 8, 64):
        of = task("micro_batch=32")
        sizes.append(memory(of, resolved_for(of, STAGES[stage], gpus, H), H, recompute=False).total)
    assert sizes[1] > sizes[2]
    assert sizes == sorted(sizes, reverse=True) or stage > 1  # with a second rank come buckets


def test_the_largest_micro_batch_that_fits_does_and_the_next_does_not() -> None:
    small = replace(H, memory=8 * GIB)
    plan = planned(1, "micro_batch=2048", device=small)
    stage = next(each for each in plan.stages if each.stage == 1)
    assert stage.most is not None
    assert stage.most_recomputed is not None
    assert stage.most < stage.most_recomputed
    of = task("micro_batch=2048")
    resolved = resolved_for(of, STAGES[1], 1, small)
    for rows, fits in ((stage.most, True), (2 * stage.most, False)):
        needed = memory(of, replace(resolved, micro_batch=rows), small, recompute=False)
        assert (needed.total <= small.usable) is fits


def test_nothing_is_recommended_where_nothing_fits() -> None:
    plan = planned(1, device=replace(H, memory=GIB // 4))
    assert plan.best is None
    assert plan.seconds is None


# ---------------------------------------------------------------------------------- reading and saving


def test_a_sample_takes_its_stride_and_ranks_that_share_lanes_fetch_it_again() -> None:
    config = task().config  # 256 lanes
    alone = reading(config, 256, 8, 1000.0)
    assert alone.sample == 154_112
    assert alone.again == 1
    assert alone.store == 154_112_000
    assert alone.gpu == pytest.approx(alone.store / 256)
    assert alone.node == pytest.approx(alone.store / 32)
    assert reading(config, 1024, 8, 1000.0).again == 4


def test_a_view_takes_what_its_shards_do(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    manifest = make_shards(tmp_path, [21], image_size=32, patch_size=8)
    config = task(
        "model.image_size=32", "model.patch_size=8", "masking.masked_patches=6", "masking.min_block=4"
    ).config
    assert view_bytes(config, 21) == sum(shard.bytes for shard in manifest.view_shards(0))
    assert view_bytes(config, 4096 + 21) == view_bytes(config, 4096) + view_bytes(config, 21)


def test_a_slow_store_sets_the_pace() -> None:
    slow = planned(64, store=Figure(1 * GB, "given"))
    assert slow.best is not None
    assert slow.best.step == slow.best.data == pytest.approx(2048 * 154_112 / GB)
    assert images(slow) < images(planned(64))


def test_days_follow_from_epochs_images_and_step() -> None:
    plan = planned(8, "epochs=10", "checkpoint.every_minutes=1", samples=1_000_000)
    assert plan.best is not None
    assert plan.steps == math.ceil(10 * 1_000_000 / 2048)
    assert plan.checkpoint is not None
    saves = plan.steps * plan.best.step // 60
    assert saves > 0
    assert plan.seconds == pytest.approx(plan.steps * plan.best.step + saves * plan.checkpoint.stall)
    assert planned(8).steps is None


# --------------------------------------------------------------------------------------- more and more


def test_more_gpus_take_no_longer_and_exchange_a_larger_share() -> None:
    found = [planned(gpus, "compile=true").best for gpus in (1, 8, 64, 256)]
    steps = [best.step for best in found if best]
    shares = [best.exposed_share for best in found if best]
    assert steps == sorted(steps, reverse=True)
    assert shares == sorted(shares)
    assert shares[0] == 0


def test_a_faster_network_takes_no_longer() -> None:
    steps = [planned(64, device=replace(H, network=rate * GB)).best for rate in (5, 50, 500)]
    assert [best.step for best in steps if best] == sorted((best.step for best in steps if best), reverse=True)


def test_a_stage_that_the_recipe_rules_out_is_named_with_the_reason() -> None:
    plan = planned(8, "compile=true")
    assert [bool(stage.refused) for stage in plan.stages] == [False, False, False, True]
    assert "compile" in plan.stages[3].refused
    muon = planned(8, "optimizer.name=muon")
    assert [bool(stage.refused) for stage in muon.stages] == [False, True, True, True]


def test_a_batch_that_cannot_be_dealt_is_refused_with_those_that_can() -> None:
    with pytest.raises(ConfigError, match="global_batch: got 2048, expected a multiple of the 3 ranks"):
        planned(3)


def test_what_breaks_is_told_with_the_first_number_that_it_holds_for() -> None:
    of = task("compile=true")
    found = limits(of, STAGES, make_plan(of, STAGES, Question(gpus=8, per_node=8, device=H)))
    assert [limit.gpus for limit in found] == sorted(limit.gpus for limit in found)
    lanes = next(limit for limit in found if "share lanes" in limit.what)
    assert (lanes.gpus, lanes.instead) == (512, "start with loader.lanes=512")
    assert found[-1].what == "this many GPUs do not divide the global batch of 2,048"
    exposed = next(limit for limit in found if "exchange" in limit.what)
    for gpus, holds in ((exposed.gpus, True), (exposed.gpus // 2, False)):
        best = planned(gpus, "compile=true").best
        assert best is not None
        assert (best.exposed_share > 0.1) is holds
    assert files_of_rank_0(512, cpu=False) > OPEN_FILES > files_of_rank_0(256, cpu=False)


def test_the_limits_are_those_of_the_run_and_not_of_the_number_that_is_planned() -> None:
    of = task("compile=true")
    asked = Question(gpus=1, per_node=8, device=H)
    first, second = (limits(of, STAGES, make_plan(of, STAGES, replace(asked, gpus=gpus))) for gpus in (1, 512))
    assert first == second


def test_parameters_and_flops_are_the_tasks() -> None:
    plan, of = planned(1), task()
    assert plan.parameters == count_parameters(of) == 91_965_776
    assert plan.multiply_adds == of.multiply_adds
    assert H100[True].mfu > H100[False].mfu


def test_stage_3_gathers_twice_what_it_may_not_keep() -> None:
    config = task("global_batch=16", "micro_batch=16", "precision=bf16").config
    resolved = resolve(config, STAGES[3], 2)
    kept = resolved.deepspeed["zero_optimization"].setdefault("stage3_max_live_parameters", 1000)
    times = [next(exchanges(resolved, parameters, cpu=False)).times for parameters in (kept, kept + 1)]
    assert times == [1, 2]


def test_an_update_moves_60_bytes_a_value_of_a_ranks_share_on_a_cpu() -> None:
    cpu = replace(NO_CPU, memory_rate=6e9)
    assert [update_seconds(10**9, 4, stage, cpu) for stage in (0, 1)] == pytest.approx([10, 2.5])
    assert update_seconds(10**9, 4, 1, H) == 0
