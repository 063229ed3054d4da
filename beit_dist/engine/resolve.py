"""The recipe and the DeepSpeed JSON together: batch arithmetic, ``"auto"`` filled in, conflicts refused.

The JSON is the one truth for the ZeRO stage and the accumulation type; the recipe for the rest. Where both speak,
as they may of the precision, they must agree.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from beit_dist.config.reading import read_text
from beit_dist.config.run import RunConfig
from beit_dist.engine.optimizers.table import check_optimizer
from beit_dist.errors import ConfigError

AUTO = "auto"
BUILT_IN: dict[str, Any] = {"zero_optimization": {"stage": 0}}
"""DeepSpeed's settings where none are given: nothing sharded, weights and gradients in fp32."""

_KNOWN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "comms_logger",
    "flops_profiler",
    "zero_allow_untested_optimizer",
}
_SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "comms_logger", "flops_profiler")
_SCALER: dict[str, Any] = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
"""DeepSpeed's own defaults of the dynamic loss scale (runtime/precision_config.py), spelt out for run folders."""
_RECIPES_OWN = {"optimizer": "optimizer", "scheduler": "optimizer", "checkpoint": "checkpoint"}


@dataclass(frozen=True)
class Resolved:
    """A run's arithmetic on a given number of ranks, and the complete DeepSpeed configuration."""

    ranks: int
    micro_batch: int
    accumulation: int
    stage: int
    precision: str
    """``bf16``, ``fp16`` or ``fp32``; ``auto`` until it is :meth:`settled`."""
    accumulation_type: str
    deepspeed: dict[str, Any]
    """With ``"auto"`` for what is not settled."""
    why: str = ""
    """Where the precision comes from."""
    excluded: tuple[str, ...] = ()
    """What ``auto`` may not stand for."""

    @property
    def rank_batch(self) -> int:
        """Samples of a rank in one optimizer step."""
        return self.micro_batch * self.accumulation

    def settled(self, precision: str, why: str) -> Resolved:
        """The same in a precision that ``auto`` stands for, as DeepSpeed must be told of it."""
        accumulation = precision if self.accumulation_type == AUTO else self.accumulation_type
        filled = dict(self.deepspeed)
        for name, built_in in (("bf16", {}), ("fp16", _SCALER)):
            if name in filled or name == precision:
                own = built_in if name == precision else {}
                filled[name] = {**own, **filled.get(name, {}), "enabled": name == precision}
        return replace(self, precision=precision, accumulation_type=accumulation, deepspeed=filled, why=why)

    @property
    def optimizer_is_bare(self) -> bool:
        """Whether DeepSpeed uses the optimizer as it is, without one of its own around it: none of its checks."""
        return self.stage == 0 and self.precision == "fp32"


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read the file of ``--ds_config``."""
    text = read_text("--ds_config", path, "JSON")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("--ds_config", str(path), "valid JSON", str(error)) from None
    if not isinstance(tree, dict):
        raise ConfigError("--ds_config", str(path), "a JSON object")
    return tree


def resolve(config: RunConfig, ds_config: Mapping[str, Any] | None, ranks: int) -> Resolved:
    """Combine recipe and JSON for ``ranks`` ranks.

    Args:
        ds_config: None takes the built-in settings, in which only what is not DeepSpeed's can be of low precision.

    Raises:
        ConfigError: they conflict, the ranks do not divide the global batch, or DeepSpeed or the optimizer cannot
            do it.
    """
    if ds_config is None and config.precision == "fp16":
        way_out = "Give --ds_config zero1, or use another precision."
        raise ConfigError("precision", "fp16", "DeepSpeed's loss scaler, without which fp16 underflows", way_out)
    resolved = combine(
        BUILT_IN if ds_config is None else ds_config,
        ranks,
        batch=config.global_batch,
        micro_batch=config.micro_batch,
        clip_grad=config.optimizer.clip_grad,
        precision="fp32" if ds_config is None else config.precision,
    )
    config.check_engine(resolved.stage, resolved.precision)
    check_optimizer(config.optimizer, resolved.stage, resolved.precision)
    return resolved


def combine(
    ds_config: Mapping[str, Any],
    ranks: int,
    *,
    batch: int,
    micro_batch: int,
    clip_grad: float,
    precision: str,
) -> Resolved:
    """What any recipe says of batch, clipping and precision, and the JSON, for ``ranks`` ranks.

    Raises:
        ConfigError: as :func:`resolve`.
    """
    _check_keys(ds_config)
    stage, accumulation_type = _numerics(ds_config)
    precision, why = _precision(ds_config, precision, stage, accumulation_type)
    excluded = ("fp16",) if ds_config.get("fp16", {}).get("enabled") is False else ()
    _check_sections(ds_config)
    micro, accumulation = batch_arithmetic(batch, micro_batch, ranks)
    filled = dict(ds_config)
    filled["train_batch_size"] = _agree(ds_config, "train_batch_size", batch)
    filled["train_micro_batch_size_per_gpu"] = _agree(ds_config, "train_micro_batch_size_per_gpu", micro)
    filled["gradient_accumulation_steps"] = _agree(ds_config, "gradient_accumulation_steps", accumulation)
    filled["gradient_clipping"] = _agree(ds_config, "gradient_clipping", clip_grad)
    filled["zero_allow_untested_optimizer"] = True  # asked for where DeepSpeed does not know an optimizer
    if accumulation_type == AUTO:
        filled.pop("data_types", None)  # DeepSpeed's own default is the precision, and it does not know "auto"
    resolved = Resolved(ranks, micro, accumulation, stage, precision, accumulation_type, filled, why, excluded)
    return resolved if precision == AUTO else resolved.settled(precision, why)


def batch_arithmetic(global_batch: int, micro_batch: int, ranks: int) -> tuple[int, int]:
    """The largest micro-batch up to ``micro_batch`` that divides a rank's share, and the accumulation steps.

    Raises:
        ConfigError: ``ranks`` does not divide ``global_batch``; names what near by would fit.
    """
    if global_batch % ranks:
        fitting = [n for n in range(1, min(global_batch, 4 * ranks) + 1) if global_batch % n == 0]
        worlds = sorted(sorted(fitting, key=lambda n: (abs(n - ranks), n))[:3])
        below = global_batch // ranks * ranks
        batches = [batch for batch in (below, below + ranks) if batch]
        raise ConfigError(
            "global_batch",
            global_batch,
            f"a multiple of the {ranks} ranks",
            f"Use global_batch={' or '.join(map(str, batches))}, or {_in_words(worlds)} ranks.",
        )
    share = global_batch // ranks
    micro = next(size for size in range(min(micro_batch, share), 0, -1) if share % size == 0)
    return micro, share // micro


def _check_keys(ds_config: Mapping[str, Any]) -> None:
    for key in ds_config:
        if key in _RECIPES_OWN:
            raise ConfigError(
                f"--ds_config {key}",
                ds_config[key],
                "no such section",
                f"The recipe's {_RECIPES_OWN[key]} sets it.",
            )
        if key not in _KNOWN:
            close = difflib.get_close_matches(key, _KNOWN, n=1)
            way_out = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(sorted(_KNOWN))}."
            raise ConfigError(f"--ds_config {key}", ds_config[key], "a known DeepSpeed setting", way_out)
        if key in _SECTIONS and not isinstance(ds_config[key], Mapping):
            raise ConfigError(f"--ds_config {key}", ds_config[key], "a section: {...}")


def _check_sections(ds_config: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would refuse in a traceback, after the ranks have joined, or would not read."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name in set(ds_config.get("data_types", {})) - {"grad_accum_dtype"}:
        raise ConfigError(
            f"--ds_config data_types.{name}", ds_config["data_types"][name], "no setting but grad_accum_dtype"
        )
    schemas = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, schema in schemas.items():
        try:
            given = ds_config.get(section, {})
            schema(**{key: value for key, value in given.items() if (key, value) != ("enabled", AUTO)})
        except ValidationError as error:
            fault = error.errors()[0]
            field = ".".join([section, *map(str, fault["loc"])])
            expected, way_out = fault["msg"][0].lower() + fault["msg"][1:], ""
            if fault["type"] == "extra_forbidden":
                close = difflib.get_close_matches(str(fault["loc"][-1]), schema.model_fields, n=1)
                expected = "a setting that DeepSpeed knows there"
                way_out = f"Did you mean {section}.{close[0]}?" if close and len(fault["loc"]) == 1 else ""
            raise ConfigError(
                f"--ds_config {field}", fault["input"], expected.removeprefix("input should be "), way_out
            ) from None


def _numerics(ds_config: Mapping[str, Any]) -> tuple[int, str]:
    """ZeRO stage and accumulation type of the JSON, if they can be run; ``auto`` is the precision itself."""
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError("--ds_config zero_optimization.stage", stage, "0, 1, 2 or 3")
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section):
            raise ConfigError(f"--ds_config zero_optimization.{section}", zero[section], "no offloading")
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if ds_config.get("bf16", {}).get(name):
            raise ConfigError(f"--ds_config bf16.{name}", True, "false", "Checkpoints hold fp32 state.")
    if ds_config.get("fp16", {}).get("fp16_master_weights_and_grads"):
        raise ConfigError(
            "--ds_config fp16.fp16_master_weights_and_grads", True, "false", "Checkpoints hold fp32 state."
        )
    for section, name in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if ds_config.get(section, {}).get(name) is False:
            raise ConfigError(
                f"--ds_config {section}.{name}",
                False,
                "true",
                "Without it DeepSpeed updates the weights from gradients that are not finite.",
            )
    asked = ds_config.get("data_types", {}).get("grad_accum_dtype") or AUTO
    if asked not in ("fp32", "bf16", "fp16", AUTO):
        raise ConfigError("--ds_config data_types.grad_accum_dtype", asked, "fp32, bf16 or fp16")
    return stage, asked


def _precision(ds_config: Mapping[str, Any], recipes: str, stage: int, accumulation: str) -> tuple[str, str]:
    """The precision by name, or ``auto``, and where it comes from.

    Raises:
        ConfigError: recipe and JSON contradict each other, or DeepSpeed cannot sum the gradients as it is told.
    """
    given = _precision_of_json(ds_config)
    refused = recipes == "fp16" and ds_config.get("fp16", {}).get("enabled") is False
    if refused or (AUTO not in (given, recipes) and given != recipes):
        raise ConfigError(
            "precision",
            recipes,
            f"{'another' if given == AUTO else given} as --ds_config has it, or auto",
            'Change one of the two, or let the JSON defer to the recipe: "bf16": {"enabled": "auto"}.',
        )
    precision, why = (recipes, "from the recipe") if given == AUTO else (given, "from --ds_config")
    if precision == AUTO and accumulation == "fp16" and ds_config.get("fp16", {}).get("enabled") is False:
        raise ConfigError(
            "--ds_config data_types.grad_accum_dtype", accumulation, "fp32, as fp16.enabled is false"
        )
    if precision == AUTO and accumulation in ("bf16", "fp16"):
        precision, why = accumulation, "the type in which --ds_config has gradients summed"
    elif precision == AUTO and stage == 0:
        precision, why = "fp32", "auto at ZeRO stage 0: DeepSpeed cannot sum bf16 gradients in fp32 there"
    if accumulation not in ("fp32", precision, AUTO):
        raise ConfigError(
            "--ds_config data_types.grad_accum_dtype",
            accumulation,
            f"{' or '.join(dict.fromkeys(['fp32', precision]))}, the precision",
        )
    if stage == 0 and accumulation not in (precision, AUTO):
        raise ConfigError(
            "--ds_config data_types.grad_accum_dtype",
            accumulation,
            f"{precision} at ZeRO stage 0 (DeepSpeed cannot sum {precision} gradients in fp32 there)",
            "Set zero_optimization.stage to 1, which can do that.",
        )
    return precision, why


def _precision_of_json(ds_config: Mapping[str, Any]) -> str:
    """What ``bf16.enabled`` and ``fp16.enabled`` come to; ``auto`` where neither is said."""
    said = {name: ds_config.get(name, {}).get("enabled", AUTO) for name in ("bf16", "fp16")}
    for name, enabled in said.items():
        if "enabled" in ds_config.get(name, {}) and not isinstance(enabled, bool):
            if name == "bf16" and enabled == AUTO:
                continue
            way_out = "The recipe's precision=fp16 turns it on." if enabled == AUTO else ""
            expected = "true or false" if name == "fp16" else 'true, false or "auto"'
            raise ConfigError(f"--ds_config {name}.enabled", enabled, expected, way_out)
    if said["bf16"] is True and said["fp16"] is True:
        raise ConfigError("--ds_config fp16.enabled", True, "only one of bf16 and fp16 enabled")
    for name, enabled in said.items():
        if enabled is True:
            return name
    return "fp32" if said["bf16"] is False else AUTO


def _agree(ds_config: Mapping[str, Any], key: str, value: float) -> float:
    """``value``, unless the JSON says another number."""
    asked = ds_config.get(key, AUTO)
    if asked != AUTO and asked != value:
        raise ConfigError(
            f"--ds_config {key}", asked, f'{value} as the recipe has it, or "auto"', "Change one of the two."
        )
    return value


def _in_words(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
