"""``attention`` and ``fp8``: what they are refused for, how they reach a model, and what is said of them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.model import BackboneConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine import task
from beit_dist.engine.compiled import compile_blocks
from beit_dist.engine.fast_paths import FastPaths
from beit_dist.engine.introduction import setup_rows
from beit_dist.engine.resolve import resolve
from beit_dist.engine.resume import compare_recipes
from beit_dist.engine.wrapped import build_engine
from beit_dist.errors import ConfigError
from beit_dist.models.attention import Attention, attend
from beit_dist.tasks.finetuning.classification import Classification
from beit_dist.tasks.pretraining.task import Pretraining

SMALL: dict[str, Any] = {"width": 32, "heads": 2, "depth": 2, "image_size": 32, "patch_size": 8, "vocabulary": 64}
MASKING = {"min_block": 4}
BF16 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to have a GPU, and packages of some version; None is one that is missing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = importlib.import_module

    def pretend(capability: tuple[int, int] = (9, 0), **versions: str | None) -> None:
        def imported(name: str) -> Any:
            if name not in versions:
                return found(name)
            if versions[name] is None:
                raise ImportError(f"No module named '{name}'")
            return SimpleNamespace(__version__=versions[name])

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(importlib, "import_module", imported)

    return pretend


def paths(**given: Any) -> FastPaths:
    """Fast paths of a small model."""
    sizes = {"width": 64, "heads": 2, **given.pop("model", {})}
    return FastPaths(**{"attention": "library", "fp8": False, "backbone": BackboneConfig(**sizes), **given})


def test_the_library_runs_anywhere() -> None:
    paths().check("cpu")


@pytest.mark.parametrize(
    ("device", "capability", "version", "model", "said"),
    [
        ("cpu", (9, 0), "3.7.1", {}, "library on a cpu: the kernel is written for GPUs"),
        ("cuda", (9, 0), None, {}, r"triton 3.2 or newer, which cannot be imported \(No module named 'triton'\)"),
        ("cuda", (9, 0), "3.1.0", {}, "triton 3.2 or newer; 3.1.0 is installed"),
        ("cuda", (7, 5), "3.7.1", {}, "compute capability 8.0 or above; Some GPU has 7.5"),
        ("cuda", (9, 0), "3.7.1", {"width": 320}, "heads of 160 values: the kernel takes at most 128"),
    ],
)
def test_the_kernel_is_refused_where_it_cannot_run(
    machine: Callable[..., None],
    device: str,
    capability: tuple[int, int],
    version: str | None,
    model: dict[str, int],
    said: str,
) -> None:
    machine(capability, triton=version)
    with pytest.raises(ConfigError, match=f"^attention: got 'kernel', expected .*{said}.*attention=library"):
        paths(attention="kernel", model=model).check(device)
    machine((8, 0), triton="3.10.0+git")
    paths(attention="kernel").check("cuda")


@pytest.mark.parametrize(
    ("device", "capability", "version", "model", "said"),
    [
        ("cpu", (9, 0), "0.18.0", {}, "fp8: got True, expected false on a cpu"),
        ("cuda", (8, 6), "0.18.0", {}, "fp8: .*compute capability 8.9 or above; Some GPU has 8.6"),
        ("cuda", (9, 0), None, {}, r"fp8: .*torchao 0.10 or newer, which cannot .*pip install 'beit_dist\[fp8\]'"),
        ("cuda", (9, 0), "0.9.0", {}, "fp8: .*torchao 0.10 or newer; 0.9.0 is installed"),
        ("cuda", (9, 0), "0.18.0", {"width": 72}, "model.width: got 72, expected a multiple of 16 with fp8"),
        ("cuda", (9, 0), "0.18.0", {"mlp_ratio": 3.9}, "model.mlp_ratio · model.width: got 249"),
    ],
)
def test_float8_is_refused_where_it_cannot_run(
    machine: Callable[..., None],
    device: str,
    capability: tuple[int, int],
    version: str | None,
    model: dict[str, Any],
    said: str,
) -> None:
    machine(capability, torchao=version)
    with pytest.raises(ConfigError, match=f"^{said}"):
        paths(fp8=True, model=model).check(device)
    machine((8, 9), torchao="0.18.0")
    paths(fp8=True).check("cuda")


@pytest.mark.parametrize("kind", [PretrainingConfig, FinetuningConfig])
@pytest.mark.parametrize(
    ("ds_config", "settings", "said"),
    [
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}, {}, "false with precision auto"),
        ({"zero_optimization": {"stage": 1}}, {"precision": "fp32"}, "false with precision fp32"),
        (BF16, {"compile": False}, "false without compile"),
        ({**BF16, "zero_optimization": {"stage": 3}}, {"compile": False}, "false at ZeRO stage 3"),
    ],
)
def test_float8_is_refused_where_the_engine_rules_it_out(
    kind: type[Any], ds_config: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    config = kind(run="r", fp8=True, **{"compile": True, **settings})
    with pytest.raises(ConfigError, match=f"^fp8: got True, expected {said}"):
        resolve(config, ds_config, 1)
    resolve(kind(run="r", fp8=True, compile=True), BF16, 1)


@pytest.mark.parametrize("attention", ["library", "kernel"])
def test_the_setting_reaches_every_block(attention: str) -> None:
    pytest.importorskip("triton")
    config = PretrainingConfig(run="r", model=SMALL, masking=MASKING, attention=attention)  # type: ignore[arg-type]
    training = Pretraining(config)
    model = training.model()
    training.paths.apply(model)
    used = {module.attend for module in model.modules() if isinstance(module, Attention)}
    assert used == ({attend} if attention == "library" else {fused()})


def fused() -> Any:
    """The kernel's function."""
    return sys.modules["beit_dist.models.kernels.attention"].fused_attention


@pytest.mark.parametrize("kind", [Pretraining, Classification])
def test_a_start_says_what_computes_the_blocks(kind: type[Any]) -> None:
    config_of = PretrainingConfig if kind is Pretraining else FinetuningConfig
    config = config_of(run="r", attention="kernel", fp8=True, compile=True)
    said = kind(config).paths.rows()
    assert said == [
        ("attention", "by the Triton kernel (attention=kernel)"),
        ("fp8", "products of the blocks in float8; head and embedding in bf16"),
    ]
    assert kind(config_of(run="r")).paths.rows() == [("attention", "by PyTorch (attention=library)")]


def test_it_is_said_beside_the_precision() -> None:
    config = PretrainingConfig(run="r", model=SMALL, masking=MASKING)  # type: ignore[arg-type]
    rows = dict(setup_rows(Pretraining(config), resolve(config, BF16, 1)))
    assert list(rows)[-2:] == ["precision", "attention"]


def test_both_may_change_on_resume_as_compile_may(capsys: pytest.CaptureFixture[str]) -> None:
    before = PretrainingConfig(run="r").model_dump(mode="json")
    now = PretrainingConfig(run="r", attention="kernel", fp8=True, compile=True)
    compare_recipes(now, before, loud=True, frozen=Pretraining.frozen, shown=Pretraining.shown)
    without = {name: value for name, value in before.items() if name not in ("attention", "fp8")}
    compare_recipes(now, without, loud=True, frozen=Pretraining.frozen, shown=Pretraining.shown)
    assert capsys.readouterr().out == ""


def test_a_model_without_a_backbone_is_left_alone() -> None:
    paths(attention="library").apply(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_float8_trains_under_deepspeeds_engine(
    joined: torch.device, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    pytest.importorskip("torchao")
    from beit_dist.models import float8

    monkeypatch.setattr(float8, "use_float8", functools.partial(float8.use_float8, emulate=True))
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(task, "compile_blocks", lambda model: compile_blocks(model, backend))
    config = PretrainingConfig(
        run="r",
        model=SMALL,  # type: ignore[arg-type]
        masking=MASKING,  # type: ignore[arg-type]
        global_batch=4,
        micro_batch=2,
        compile=True,
        fp8=True,
    )
    engine = build_engine(
        Pretraining(config), resolve(config, {**BF16, "zero_optimization": {"stage": stage}}, 1), joined
    )
    assert list(engine.module.state_dict()) == list(Pretraining(config).model().state_dict())
    patches = torch.randint(0, 256, (2, 16, 192), generator=torch.Generator().manual_seed(0)).byte()
    batch = patches, torch.arange(32).view(2, 16) % 4, torch.arange(7).expand(2, -1)
    losses = []
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(8):
        for _ in range(2):
            losses.append(engine(*batch, torch.ones(2, 2, 2))[0])
            engine.backward(losses[-1] / 14, scale_wrt_gas=False)
            engine.step()
    assert losses[-1] < 0.8 * losses[0]
    assert backend.frame_count == 1
    assert not any(block.ran_uncompiled for block in engine.module.blocks)


@pytest.mark.slow
def test_a_run_with_the_kernel_is_refused_on_a_cpu_and_trains_in_the_interpreter(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    overrides = ["loader.workers=0", "steps=2", "optimizer.warmup_steps=1"]
    plain, kernel = new_run("plain", overrides=overrides), new_run("kernel", overrides=overrides, forked=False)
    code, output = kernel.finish("attention=kernel")
    assert code == 2
    assert "attention: got 'kernel', expected library on a cpu: the kernel is written for GPUs" in output
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, output = kernel.finish("attention=kernel")
    assert code == 0, output
    assert "by the Triton kernel (attention=kernel)" in output
    assert plain.finish()[0] == 0
    expected, got = ([line["loss"] for line in run.lines()] for run in (plain, kernel))
    assert got == pytest.approx(expected, rel=1e-5)
