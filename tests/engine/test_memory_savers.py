"""Activation checkpointing under the real engine: the same run to the last bit, also where ZeRO 3 gathers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.resolve import resolve
from beit_dist.errors import ConfigError


@pytest.mark.slow
def test_a_run_that_recomputes_is_the_same_to_the_last_bit(new_run: Callable[..., Any]) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ds = {"zero_optimization": zero, "bf16": {"enabled": True}}
    runs = []
    for name, more in (("kept", []), ("recomputed", ["activation_checkpointing=true"])):
        settings = ["loader.workers=0", "steps=4", "optimizer.warmup_steps=1", *more]
        run = new_run(name, ds, ranks=2, overrides=settings)
        code, output = run.finish()
        assert code == 0, output
        runs.append(run)
    kept, recomputed = runs
    assert recomputed.numbers() == kept.numbers()
    assert recomputed.final_files() == kept.final_files()


def test_compiling_is_refused_where_it_cannot_help() -> None:
    config = PretrainingConfig(run="r", compile=True)
    with pytest.raises(ConfigError, match="compile: got True, expected false at ZeRO stage 3"):
        resolve(config, {"zero_optimization": {"stage": 3}}, 1)
    assert resolve(config, {"zero_optimization": {"stage": 2}}, 1).stage == 2
