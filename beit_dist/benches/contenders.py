"""Who takes a training step: this system, Hugging Face's BEiT, and the original code where its folder is given.

All have the released settings (one relative position bias, LayerScale 0.1, 75 masked patches of 196, 8192 tokens),
random weights, and no stochastic depth. A step is forward, loss and backward of one batch, already on the device.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit_dist.benches.inputs import MASKED, inputs
from beit_dist.config.dvae import DVAEConfig
from beit_dist.config.model import ModelConfig
from beit_dist.engine.compiled import compile_blocks
from beit_dist.models.dvae import DVAE
from beit_dist.models.mim import MaskedImageModel, masked_patches

Step = Callable[[], Tensor]
"""Takes a training step, without an update of the weights if nothing else is said, and returns the loss."""


class UnavailableError(Exception):
    """A contender is not to be had here; the text says why."""


def ours(config: ModelConfig, batch: int, device: torch.device, kind: torch.dtype, *, compiled: bool) -> Step:
    """This system's model, as the trainer builds it."""
    model = MaskedImageModel(config).to(device)
    model.initialise(0)
    model.to(kind)
    if compiled:
        compile_blocks(model)
        if device.type == "cuda":
            model.compile_score()
    given = inputs(config, batch, device)
    return partial(_step, model, lambda: model(*given)[0] / (batch * MASKED))


def updated(config: ModelConfig, batch: int, device: torch.device, kind: torch.dtype, *, compiled: bool) -> Step:
    """Ours with an update in plain PyTorch: clipping, fused AdamW on fp32 master weights; without DeepSpeed."""
    model = MaskedImageModel(config).to(device)
    model.initialise(0)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(kind)
    if compiled:
        compile_blocks(model)
        if device.type == "cuda":
            model.compile_score()
    given, optimizer = inputs(config, batch, device), torch.optim.AdamW(masters, fused=True)

    def step() -> Tensor:
        loss = _step(model, lambda: model(*given)[0] / (batch * MASKED))
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None  # for the type checker
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), masters)
        return loss

    return step


def hugging_face(
    config: ModelConfig, batch: int, device: torch.device, kind: torch.dtype, *, attention: str, compiled: bool
) -> Step:
    """``BeitForMaskedImageModeling`` of the transformers that is installed."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise UnavailableError(f"transformers: {error}; pip install transformers") from error
    settings = transformers.BeitConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=int(config.width * config.mlp_ratio),
        image_size=config.image_size,
        patch_size=config.patch_size,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=config.layer_scale,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    model = transformers.BeitForMaskedImageModeling(settings).to(device, kind)
    images, masked, tokens = _images(config, batch, device, kind)
    call = torch.compile(model, dynamic=False) if compiled else model
    return partial(_step, model, lambda: call(pixel_values=images, bool_masked_pos=masked, labels=tokens).loss)


def original(
    config: ModelConfig,
    batch: int,
    device: torch.device,
    kind: torch.dtype,
    *,
    folder: Path | None,
    tokenises: bool,
) -> Step:
    """The released code, from its folder (microsoft/unilm, ``beit``).

    Args:
        tokenises: as its training loop does, in each step, in fp32 (``engine_for_pretraining.py``).
    """
    if folder is None:
        raise UnavailableError("the original code: name its folder (microsoft/unilm, beit) by --original")
    with _importing(folder):
        module = importlib.import_module("modeling_pretrain")
    model = module.VisionTransformerForMaskedImageModeling(
        img_size=config.image_size,
        patch_size=config.patch_size,
        vocab_size=config.vocabulary,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        init_values=config.layer_scale,
        use_shared_rel_pos_bias=True,
        use_abs_pos_emb=False,
    ).to(device, kind)
    images, masked, tokens = _images(config, batch, device, kind)
    encoder = DVAE(DVAEConfig()).to(device).eval().requires_grad_(False) if tokenises else None
    size = config.image_size // 2
    small = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device) if tokenises else None

    def loss() -> Tensor:
        wanted = tokens
        if encoder is not None and small is not None:
            wanted = encoder.tokens(small).view(batch, -1)[masked]
        return nn.functional.cross_entropy(model(images, bool_masked_pos=masked), wanted)

    return partial(_step, model, loss)


CONTENDERS: dict[str, Callable[..., Step]] = {
    "ours": partial(ours, compiled=False),
    "ours, compiled": partial(ours, compiled=True),
    "Hugging Face, eager": partial(hugging_face, attention="eager", compiled=False),
    "Hugging Face, SDPA": partial(hugging_face, attention="sdpa", compiled=False),
    "Hugging Face, SDPA, compiled": partial(hugging_face, attention="sdpa", compiled=True),
    "original": partial(original, tokenises=False),
    "original, tokenises": partial(original, tokenises=True),
}
"""By name; those whose name begins alike are ways to run the same."""

UPDATED: dict[str, Callable[..., Step]] = {
    "ours, updated": partial(updated, compiled=False),
    "ours, compiled, updated": partial(updated, compiled=True),
}
"""What the trainer is compared with."""


def _step(model: nn.Module, loss: Step) -> Tensor:
    model.zero_grad(set_to_none=True)
    value = loss()
    torch.autograd.backward(value)
    return value.detach()


def _images(
    config: ModelConfig, batch: int, device: torch.device, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch as peers take it: normalised images, masks (B, P), and the tokens of the masked patches."""
    patches, tokens, positions = inputs(config, batch, device)
    grid, size = config.grid, config.patch_size
    images = patches.view(-1, grid, grid, size, size, 3).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    images = images.reshape(batch, 3, config.image_size, config.image_size)
    masked = masked_patches(positions, config.patches)
    return (images / 127.5 - 1).to(kind), masked, tokens.long()[masked]


@contextlib.contextmanager
def _importing(folder: Path) -> Any:
    """Import from a folder, with stand-ins for the parts of an old timm that the original code is built on."""
    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("timm.models.registry")
    # No stochastic depth is measured, so its branch is never taken.
    vars(layers).update(
        drop_path=lambda x, *_: x,
        to_2tuple=lambda x: x if isinstance(x, tuple) else (x, x),
        trunc_normal_=nn.init.trunc_normal_,
    )
    vars(registry)["register_model"] = lambda function: function
    parts = {"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models")}
    parts |= {"timm.models.layers": layers, "timm.models.registry": registry}
    before = {name: sys.modules.get(name) for name in parts}
    sys.modules.update(parts)
    sys.path.insert(0, str(folder))
    try:
        yield
    except ImportError as error:
        raise UnavailableError(f"the original code in {folder}: {error}") from error
    finally:
        sys.path.remove(str(folder))
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
