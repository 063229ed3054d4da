"""What the kernel computes, by Triton's interpreter, run by :mod:`test_attention` in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, so they cannot run in a process that has imported it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import OutOfResources, interpreter

from beit_dist.benches import attention as bench
from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.engine.compiled import compile_blocks
from beit_dist.engine.fast_paths import FastPaths
from beit_dist.models.attention import spelt_out
from beit_dist.models.kernels import attention
from beit_dist.models.kernels.attention import fused_attention
from beit_dist.models.kernels.tiles import Tile, Tiles, tiles_in_place, tiles_of
from beit_dist.models.mim import MaskedImageModel
from beit_dist.models.positions import position_bias, relative_position_index, relative_position_rows

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest error of a result, relative to its norm: roundings of the inputs of a product."""
TINY = ModelConfig(width=32, depth=2, heads=2, image_size=32, patch_size=8, vocabulary=64, drop_path=0.5)
_dot = interpreter.InterpreterBuilder.create_dot


@pytest.fixture(autouse=True)
def _products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy has no bf16: the interpreter (3.7) keeps its bits in integers, and multiplies those."""

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_widened(side.data), tl.float32) for side in (a, b))
        return _dot(builder, a, b, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _widened(bits: Any) -> Any:
    return bits if bits.dtype == np.float32 else (bits.astype(np.uint32) << 16).view(np.float32)


def case(batch: int, length: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random qkv, bias and gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((batch, length, 3, heads, width), (1, heads, length, length), (batch, length, heads * width))
    qkv, bias, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return qkv, bias, grad


def results(
    function: Callable[[Tensor, Tensor | None], Tensor], qkv: Tensor, bias: Tensor | None, grad: Tensor
) -> dict[str, Tensor]:
    """Output and gradients."""
    qkv = qkv.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    out = function(qkv, bias)
    out.backward(grad)
    found = {"out": out.detach(), "qkv": qkv.grad, "bias": None if bias is None else bias.grad}
    return {name: value for name, value in found.items() if value is not None}


def compare(qkv: Tensor, bias: Tensor | None, grad: Tensor, bound: float | None = None) -> None:
    """The kernel's results against fp64, and that their types are those of the inputs."""
    got = results(fused_attention, qkv, bias, grad)
    expected = results(spelt_out, qkv.double(), None if bias is None else bias.double(), grad.double())
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.shape == expected[name].shape
        assert value.dtype == (bias.dtype if name == "bias" and bias is not None else qkv.dtype)
        error = ((value.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)).item()
        assert error < (bound or BOUNDS[qkv.dtype]), f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "sizes", [(3, 17, 2, 16), (2, 37, 2, 32), (2, 65, 1, 64), (1, 197, 1, 64), (1, 37, 1, 24)], ids=str
)
def test_output_and_gradients_are_those_of_fp64(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    compare(*case(*sizes, dtype))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_there_may_be_no_bias(dtype: torch.dtype) -> None:
    qkv, _, grad = case(2, 65, 1, 16, dtype)
    compare(qkv, None, grad)


def test_one_token_attends_to_itself() -> None:
    qkv, bias, grad = case(2, 1, 2, 16, torch.float32)
    got = results(fused_attention, qkv, bias, grad)
    torch.testing.assert_close(got["out"], qkv[:, :, 2].flatten(2))
    assert got["bias"].abs().max() < 1e-6


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16], ids=str)
def test_a_bias_may_have_another_type(bias_dtype: torch.dtype) -> None:
    qkv, bias, grad = case(2, 37, 1, 16, torch.bfloat16)
    compare(qkv, bias.to(bias_dtype), grad)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what lies behind the last key
def test_logits_may_be_too_large_for_an_exponential() -> None:
    qkv, bias, grad = case(2, 70, 1, 16, torch.float32)
    compare(10 * qkv, bias - 200, grad, bound=2e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_bias_gradient_is_summed_over_chunks_of_the_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four tiles of each head: 12 programs make three chunks, of two samples, the last with one.
    monkeypatch.setattr(attention, "_PROGRAMS", 12)
    tile = Tile(32, 32, 4, 1)
    with tiles_in_place(Tiles(tile, tile, tile, tile)):
        compare(*case(batch, 37, 1, 16, torch.float32))


@pytest.mark.parametrize("sides", [(16, 32), (64, 16)])
def test_other_tiles_give_the_same(sides: tuple[int, int]) -> None:
    with tiles_in_place(Tiles(*4 * [Tile(*sides, 4, 1)])):
        compare(*case(2, 70, 1, 16, torch.float32))


def test_any_strides_are_read() -> None:
    qkv, bias, grad = case(2, 37, 2, 16, torch.float16)
    wide = torch.full((2, 40, 4, 2, 16), float("nan"), dtype=torch.float16)
    wide[:, 2:39, 1:] = qkv
    long = torch.full((1, 2, 37, 64), float("nan"), dtype=torch.float16)
    long[..., :37] = bias
    expected = results(fused_attention, qkv, bias, grad)
    for strided in (wide[:, 2:39, 1:], qkv.transpose(3, 4).contiguous().transpose(3, 4)):
        for lain in (long[..., :37], bias.transpose(2, 3).contiguous().transpose(2, 3)):
            got = results(fused_attention, strided, lain, grad.mT.contiguous().mT)
            assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_an_aligned_bias_is_read_where_it_lies_and_any_other_is_copied() -> None:
    table = torch.randn(relative_position_rows(4), 2)
    aligned = position_bias(table, relative_position_index(4))
    assert attention._aligned(aligned) is aligned
    short = aligned.untyped_storage().nbytes() // 4 - 15  # the last row ends with its last key
    cut = torch.empty(short).as_strided(aligned.shape, aligned.stride()).copy_(aligned)
    for other in (cut, aligned.contiguous(), aligned[:, :, 1:, 1:]):
        copy = attention._aligned(other)
        assert copy is not other
        assert torch.equal(copy, other)
        assert attention._aligned(copy) is copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twice_is_the_same_to_the_last_bit(dtype: torch.dtype) -> None:
    inputs = case(3, 37, 1, 16, dtype)
    first, second = (results(fused_attention, *inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_needs_no_gradient_gets_none() -> None:
    qkv, bias, grad = case(2, 17, 1, 16, torch.float32)
    frozen = qkv.requires_grad_()
    fused_attention(frozen, bias).backward(grad)
    expected = results(fused_attention, qkv, bias, grad)
    assert bias.grad is None
    assert frozen.grad is not None
    assert torch.equal(frozen.grad, expected["qkv"])
    trained = bias.requires_grad_()
    fused_attention(qkv.detach(), trained).backward(grad)
    assert trained.grad is not None
    assert torch.equal(trained.grad, expected["bias"])
    with torch.no_grad():
        assert torch.equal(fused_attention(qkv, bias), expected["out"])


def test_torch_finds_the_operations_well_declared() -> None:
    qkv, bias, _ = case(2, 17, 1, 16, torch.float32)
    for inputs in ((qkv.requires_grad_(), bias.requires_grad_()), (qkv, None)):
        torch.library.opcheck(attention._attention, inputs)


def test_the_gradient_of_a_table_is_its_slope() -> None:
    index = relative_position_index(3)
    qkv, _, grad = case(2, 10, 2, 16, torch.float32)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(relative_position_rows(3), 2, generator=generator).requires_grad_()
    (fused_attention(qkv, position_bias(table, index)) * grad).sum().backward()
    assert table.grad is not None
    direction = torch.randn(table.shape, generator=generator)

    def along(step: float) -> float:
        bias = (table.detach().double() + step * direction)[index].permute(2, 0, 1)[None]
        return float((spelt_out(qkv.double(), bias) * grad).sum())

    slope = (along(1e-4) - along(-1e-4)) / 2e-4
    assert float((table.grad * direction).sum()) == pytest.approx(slope, rel=1e-4)


def a_batch() -> tuple[Tensor, ...]:
    """Patches, tokens, positions and keeps of :data:`TINY`."""
    generator = torch.Generator().manual_seed(2)
    patches = torch.randint(0, 256, (3, TINY.patches, TINY.patch_bytes), generator=generator)
    tokens = torch.randint(0, TINY.vocabulary, (3, TINY.patches), generator=generator)
    keeps = torch.randint(0, 2, (3, TINY.depth, 2), generator=generator)
    return patches.byte(), tokens.short(), torch.arange(6).expand(3, -1).short(), keeps.byte()


def gradients(
    *, kernel: bool, recompute: bool = False, compiled: bool = False, **variant: Any
) -> dict[str, Tensor]:
    """Loss and gradients of a model."""
    config = ModelConfig(**{**TINY.model_dump(), **variant})
    model = MaskedImageModel(config, recompute=recompute)
    model.initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    FastPaths("kernel" if kernel else "library", False, BackboneConfig(width=32, heads=2)).apply(model)
    if compiled:
        compile_blocks(model, backend="aot_eager")
    loss = model(*a_batch())[0]
    loss.backward()
    if compiled:
        assert not any(block.ran_uncompiled for block in model.blocks)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize(
    "variant",
    [{}, {"block_positions": True}, {"relative_positions": False, "absolute_positions": True}],
    ids=["shared", "of each block", "none"],
)
def test_a_model_has_the_gradients_of_the_library(variant: dict[str, Any]) -> None:
    expected, got = gradients(kernel=False, **variant), gradients(kernel=True, **variant)
    assert got.keys() == expected.keys()
    assert any(not torch.equal(got[name], expected[name]) for name in got), "the kernel was not used"
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("how", [{"recompute": True}, {"compiled": True}, {"recompute": True, "compiled": True}])
def test_recomputed_and_compiled_blocks_use_it_too(how: dict[str, bool]) -> None:
    expected, got = gradients(kernel=True), gradients(kernel=True, **how)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_is_one_graph_with_what_is_around_it() -> None:
    qkv, bias, grad = case(2, 17, 1, 16, torch.float32)

    def around(qkv: Tensor, bias: Tensor | None) -> Tensor:
        return fused_attention(2 * qkv, bias) + 1

    compiled = torch.compile(around, backend="aot_eager", fullgraph=True)
    expected, got = results(around, qkv, bias, grad), results(compiled, qkv, bias, grad)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_where_shared_memory_is_too_small_fewer_stages_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*_: Any, num_stages: int, **__: Any) -> None:
                tried.append(num_stages)
                if num_stages > 1:
                    raise OutOfResources(300_000, 232_448, "shared memory")

            return launch

    monkeypatch.setattr(attention, "_stages", {})
    kernel = Kernel()
    for _ in range(2):
        attention._launch(kernel, (1,), Tile(16, 16, 4, 3), torch.zeros(1), D=16)
    assert tried == [3, 2, 1, 1]


def test_the_bench_times_every_way_to_cut_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def few(*_: Any) -> tuple[Tensor, ...]:
        qkv, bias, grad = case(1, 17, 1, 64, torch.float16)
        return qkv.requires_grad_(), bias.requires_grad_(), grad

    used: list[Tiles] = []
    monkeypatch.setattr(bench, "inputs", few)
    monkeypatch.setattr(attention, "tiles_of", lambda *sizes: used.append(tiles_of(*sizes)) or used[-1])
    contenders = {"ours": fused_attention, **dict.fromkeys(bench.TILES, fused_attention), "broken": broken}
    rows = list(bench._rows("tiny", 1, contenders, repetitions=1))
    assert [row.who for row in rows] == 2 * ["ours", *bench.TILES]
    assert {*used} == {tiles_of(64, 2), *bench.TILES.values()}
    assert used.count(bench.TILES["ours, 64 across"]) == 3 * 3  # forward; forward and backward; thrice each
    assert "left out: broken, forward: ValueError: cannot" in capsys.readouterr().err


def broken(*_: Tensor) -> Tensor:
    """A contender that this machine lacks."""
    raise ValueError("cannot")
