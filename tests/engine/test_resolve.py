"""The DeepSpeed JSON and the recipe agree, or the run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine.resolve import batch_arithmetic, read_ds_config, resolve
from beit_dist.errors import ConfigError

DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"
BF16 = {"bf16": {"enabled": True}}


def recipe(*overrides: str) -> PretrainingConfig:
    return load_recipe(PretrainingConfig, None, ["run=r", "global_batch=96", "micro_batch=32", *overrides])


@pytest.mark.parametrize(
    ("global_batch", "micro", "ranks", "expected"),
    [
        (2048, 128, 16, (128, 1)),
        (2048, 128, 1, (128, 16)),
        (96, 32, 2, (24, 2)),
        (6, 128, 2, (3, 1)),
        (14, 4, 2, (1, 7)),
    ],
)
def test_micro_batch_is_the_largest_that_divides_a_ranks_share(
    global_batch: int, micro: int, ranks: int, expected: tuple[int, int]
) -> None:
    assert batch_arithmetic(global_batch, micro, ranks) == expected
    assert expected[0] * expected[1] * ranks == global_batch


def test_ranks_that_do_not_divide_the_batch_are_told_what_fits() -> None:
    with pytest.raises(ConfigError) as caught:
        batch_arithmetic(2048, 128, 12)
    assert "global_batch=2040 or 2052" in str(caught.value)
    assert "8 or 16 or 4 ranks" in str(caught.value) or "4 or 8 or 16 ranks" in str(caught.value)


def test_auto_is_filled_in() -> None:
    resolved = resolve(recipe(), read_ds_config(DEEPSPEED / "zero1.json"), 2)
    assert resolved.deepspeed["train_batch_size"] == 96
    assert resolved.deepspeed["train_micro_batch_size_per_gpu"] == 24
    assert resolved.deepspeed["gradient_accumulation_steps"] == 2
    assert resolved.deepspeed["gradient_clipping"] == 3.0
    assert (resolved.stage, resolved.accumulation_type) == (1, "fp32")


def test_shipped_files_accumulate_in_fp32() -> None:
    for path in DEEPSPEED.glob("*.json"):
        assert resolve(recipe(), read_ds_config(path), 1).accumulation_type == "fp32"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 16}, "24 as the recipe has it"),
        ({"gradient_clipping": 1.0}, "3.0 as the recipe has it"),
        ({"optimizer": {"type": "Adam"}}, "The recipe's optimizer sets it"),
        ({"zero_optimisation": {}}, "Did you mean zero_optimization?"),
        ({"zero_optimization": {"stage": 4}}, "0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "no offloading"),
        ({**BF16, "fp16": {"enabled": True}}, "only one of bf16 and fp16"),
        ({"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "zero_optimization.stage to 1"),
        ({"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "fp32 or fp16"),
        ({**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, "zero_optimization.stage to 1"),
        ({"bf16": {"enabled": False}, "data_types": {"grad_accum_dtype": "bf16"}}, "fp32, the precision"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "fp32 state"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "gradients that are not finite"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "gradients that are not finite"),
        ({"bf16": True}, "bf16: got True, expected a section"),
        ({"bf16": {"enable": True}}, "Did you mean bf16.enabled?"),
        (
            {"fp16": {"enabled": "auto"}},
            "fp16.enabled: got 'auto', expected true or false. The recipe's precision=",
        ),
        ({"bf16": {"enabled": 1}}, 'bf16.enabled: got 1, expected true, false or "auto"'),
        ({"fp16": {"enabled": True, "loss_scale": "big"}}, "fp16.loss_scale: got 'big'"),
        ({"zero_optimization": {"stag": 1}}, "Did you mean zero_optimization.stage?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "no setting but grad_accum_dtype"),
    ],
)
def test_conflicts_and_what_cannot_be_run_are_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(recipe(), setting, 2)
    assert said in str(caught.value)


def test_a_number_equal_to_the_recipes_is_no_conflict() -> None:
    assert resolve(recipe(), {"train_batch_size": 96, "gradient_clipping": 3}, 2).micro_batch == 24


@pytest.mark.parametrize(("content", "said"), [("{", "valid JSON"), ("[]", "a JSON object")])
def test_a_file_that_is_no_ds_config_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_ds_config(path)
    with pytest.raises(ConfigError, match="readable"):
        read_ds_config(tmp_path / "absent.json")
    path.write_text(json.dumps({}))
    assert read_ds_config(path) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "\xe9"}', "text in UTF-8"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b"{}\0", "null bytes"),
        (b"", "valid JSON"),
        (b"[" * 100_000, "valid JSON"),
        (b"[]", "a JSON object"),
    ],
)
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--ds_config: got .*{said}"):
        read_ds_config(path)
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_ds_config(path) == {}
    with pytest.raises(ConfigError, match="Is a directory"):
        read_ds_config(tmp_path)
