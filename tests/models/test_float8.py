"""Products in float8: which layers, under which names, and how far they lead training astray."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit_dist.config.model import ModelConfig
from beit_dist.engine.compiled import compile_blocks
from beit_dist.models.mim import MaskedImageModel

torchao = pytest.importorskip("torchao")
from torchao.float8.float8_linear import Float8Linear  # noqa: E402

from beit_dist.models.float8 import use_float8  # noqa: E402

CONFIG = ModelConfig(width=64, depth=2, heads=2, image_size=32, patch_size=8, vocabulary=16, drop_path=0)
STEPS = 50
MASKED = 4 * 32
"""Patches of a batch."""


def a_model(
    dtype: torch.dtype = torch.bfloat16, *, float8: bool = False, recompute: bool = False
) -> MaskedImageModel:
    """With the values that a start gives it."""
    model = MaskedImageModel(CONFIG, recompute=recompute)
    model.initialise(0)
    model.to(dtype)
    if float8:
        use_float8(model, emulate=True)
    return model


def a_batch(step: int, rows: int = 32) -> tuple[Tensor, ...]:
    """Images of one grey and some noise, so that what is seen tells what is masked."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 16, (rows, 1), generator=generator).expand(-1, CONFIG.patches)
    noise = torch.randint(0, 8, (rows, CONFIG.patches, CONFIG.patch_bytes), generator=generator)
    patches = tokens.unsqueeze(-1) * 15 + noise
    positions = torch.tensor([0, 5, 10, 15]).expand(rows, -1)
    return patches.byte(), tokens.short(), positions.short()


class Trainer:
    """AdamW on masters in fp32, from which the model's weights are rounded, as DeepSpeed has it."""

    def __init__(self, model: MaskedImageModel) -> None:
        self.model = model
        self.masters = {name: nn.Parameter(value.detach().float()) for name, value in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=1e-2, betas=(0.9, 0.98))

    def train(self, steps: range) -> list[float]:
        """The losses."""
        losses = []
        for step in steps:
            self.model.zero_grad()
            loss = self.model(*a_batch(step))[0] / MASKED
            loss.backward()
            losses.append(loss.item())
            for name, parameter in self.model.named_parameters():
                self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            self.optimizer.step()
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(self.masters[name])
        return losses


def test_the_four_layers_of_each_block_are_converted_and_nothing_else() -> None:
    plain, model = a_model(), a_model(float8=True)
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert converted == {
        f"blocks.{block}.{layer}"
        for block in range(CONFIG.depth)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    others = [type(module) for name, module in model.named_modules() if name not in converted]
    assert others == [type(module) for name, module in plain.named_modules() if name not in converted]


def test_parameters_keep_their_names_order_and_values() -> None:
    plain = a_model()
    model = copy.deepcopy(plain)
    parameters = dict(model.named_parameters())
    use_float8(model, emulate=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not [name for name, _ in model.named_buffers() if name not in dict(plain.named_buffers())]


def test_both_passes_are_rounded_to_float8() -> None:
    """Values that float8 holds give the same product; a little beside them, another one, forward and backward."""
    layer = nn.Linear(32, 16, bias=False)
    layer.weight.data = torch.randint(-3, 4, (16, 32)).float()
    layer.weight.data[0, 0] = 7  # the scale is the largest value by 448: 64, so nothing is rounded
    model = a_model(torch.float32)
    model.blocks[0].attn.proj = layer  # type: ignore[union-attr]
    use_float8(model, emulate=True)
    converted: nn.Module = model.blocks[0].attn.proj  # type: ignore[union-attr, assignment]
    x = torch.randint(-3, 4, (16, 32)).float()
    x[0, 0] = 7
    assert torch.equal(converted(x), layer(x))
    assert not torch.equal(converted(x * 1.03), layer(x * 1.03)) or not torch.equal(
        converted(x + 0.01), layer(x + 0.01)
    )
    grad = torch.randn(16, 16)
    for name, (got, exact) in gradients_of(converted, layer, x, grad).items():
        assert not torch.equal(got, exact), name
        assert (got - exact).norm() < 0.1 * exact.norm(), name


def gradients_of(
    converted: nn.Module, plain: nn.Module, x: Tensor, grad: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of input and weight, of both layers."""
    found: list[tuple[Tensor, ...]] = []
    for layer in (converted, plain):
        inputs = x.clone().requires_grad_()
        found.append(torch.autograd.grad(layer(inputs), (inputs, layer.weight), grad))
    return {name: (found[0][place], found[1][place]) for place, name in enumerate(("input", "weight"))}


def test_the_loss_falls_as_in_bf16_and_fp32() -> None:
    """Over 50 steps the loss of float8 stays within a twentieth of what fp32 gains."""
    runs = {
        "fp32": Trainer(a_model(torch.float32)).train(range(STEPS)),
        "bf16": Trainer(a_model()).train(range(STEPS)),
        "float8": Trainer(a_model(float8=True)).train(range(STEPS)),
    }
    assert runs["float8"] != runs["bf16"]
    means = {name: [sum(losses[at : at + 10]) / 10 for at in range(0, STEPS, 10)] for name, losses in runs.items()}
    gained = means["fp32"][0] - means["fp32"][-1]
    assert gained > 0.5
    for name in ("bf16", "float8"):
        for exact, got in zip(means["fp32"], means[name], strict=True):
            assert abs(got - exact) < 0.05 * gained, means


def test_a_run_that_is_killed_and_continued_is_the_run_left_alone() -> None:
    """Weights pass through a file of an unconverted model's names, as they do in checkpoints."""
    left_alone = Trainer(a_model(torch.float32, float8=True))
    left_alone.train(range(3))
    weights = copy.deepcopy(left_alone.model.state_dict())
    moments = copy.deepcopy(left_alone.optimizer.state_dict())
    expected = left_alone.train(range(3, 6))

    model = a_model(torch.float32)
    model.load_state_dict(weights)
    use_float8(model, emulate=True)
    continued = Trainer(model)
    continued.optimizer.load_state_dict(moments)
    assert continued.train(range(3, 6)) == expected
    reached = left_alone.model.state_dict()
    assert all(torch.equal(value, reached[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", [{"recompute": True}, {"compiled": True}], ids=["recomputed", "compiled"])
def test_recomputed_and_compiled_blocks_use_it_too(how: dict[str, Any]) -> None:
    torch._dynamo.reset()
    expected, model = a_model(float8=True), a_model(float8=True, recompute=how.get("recompute", False))
    if how.get("compiled"):
        compile_blocks(model, backend="aot_eager")
    for one in (expected, model):
        one(*a_batch(0))[0].backward()
    if how.get("compiled"):
        assert not any(block.ran_uncompiled for block in model.blocks)
    for (name, first), second in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert (first.grad is None) == (second.grad is None), name
        if first.grad is not None and second.grad is not None:
            torch.testing.assert_close(second.grad, first.grad, rtol=0.05, atol=0.02, msg=f"{name}: {{}}".format)
