"""Computing a block again in the backward pass, and compiling it, change memory and time but not the numbers."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from beit_dist.config.model import ModelConfig
from beit_dist.engine.compiled import compile_blocks
from beit_dist.models.mim import MaskedImageModel

CONFIG = ModelConfig(width=32, depth=3, heads=2, image_size=32, patch_size=8, vocabulary=64, drop_path=0.5)


def a_batch(batch: int = 4) -> tuple[Tensor, ...]:
    """Patches, tokens, positions and keeps."""
    generator = torch.Generator().manual_seed(2)
    patches = torch.randint(0, 256, (batch, CONFIG.patches, CONFIG.patch_bytes), generator=generator)
    tokens = torch.randint(0, CONFIG.vocabulary, (batch, CONFIG.patches), generator=generator)
    positions = torch.arange(6).expand(batch, -1) + torch.arange(batch).unsqueeze(1)
    keeps = torch.randint(0, 2, (batch, CONFIG.depth, 2), generator=generator)
    return patches.byte(), tokens.short(), positions.short(), keeps.byte()


def gradients(model: MaskedImageModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loss and every parameter's gradient."""
    model.initialise(0)
    model.to(dtype)
    loss = model(*a_batch())[0]
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_gradients_are_the_same_to_the_last_bit(dtype: torch.dtype) -> None:
    kept = gradients(MaskedImageModel(CONFIG), dtype)
    again = gradients(MaskedImageModel(CONFIG, recompute=True), dtype)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    def kept_bytes(recompute: bool) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        model = MaskedImageModel(CONFIG, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(*a_batch())
        return total

    assert kept_bytes(recompute=True) < kept_bytes(recompute=False) / 2


def test_without_gradients_nothing_is_kept_or_run_twice() -> None:
    model = MaskedImageModel(CONFIG, recompute=True)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.blocks[0].register_forward_pre_hook(count)
    with torch.no_grad():
        model(*a_batch())
    assert calls == 1
    model(*a_batch())[0].backward()
    assert calls == 3


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_agree_within_rounding_and_keep_their_names(recompute: bool) -> None:
    # Inductor needs a C++ compiler on a CPU; "aot_eager" runs the same traced graphs without one.
    backend = "inductor" if shutil.which("g++") and not recompute else "aot_eager"
    plain, compiled = MaskedImageModel(CONFIG), MaskedImageModel(CONFIG, recompute=recompute)
    compile_blocks(compiled, backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    expected, got = gradients(plain), gradients(compiled)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
