"""The BEiT v1 backbone: a pre-norm ViT on flattened uint8 patches (arXiv 2106.08254, section 2).

Details that the paper leaves open follow the released code (microsoft/unilm, ``beit/modeling_finetune.py`` and
``modeling_pretrain.py``), and parameters have the names they have there. Both published variants exist:
absolute positions without LayerScale (the paper's), and one relative position bias shared by all blocks with
LayerScale (the released models').

The model draws no random numbers: which residual branches stochastic depth drops arrives with the batch.

Shapes: B samples, P patches, N = 1 + P tokens, C width, H heads, D = ``patch_size² · 3`` values of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit_dist.config.model import BackboneConfig
from beit_dist.models.attention import Attention
from beit_dist.models.normalisation import Normalisation
from beit_dist.models.positions import RelativePositionBias, relative_position_index, relative_position_rows

NORM_EPS = 1e-6
"""LayerNorm's epsilon everywhere (unilm)."""


class PatchEmbedding(nn.Module):
    """uint8 patches to tokens: normalisation, then one GEMM.

    ``proj.weight`` is (C, D) in the order pixels lie in a shard: y, x, channel. unilm has a convolution
    (C, 3, patch, patch) instead; ``weight.view(C, patch, patch, 3).permute(0, 3, 1, 2)`` is its weight.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_bytes, config.width)
        self.normalise = Normalisation(config)

    def reset_constants(self) -> None:
        """Compute the buffer anew, for a module that was built on the meta device."""
        self.normalise.reset_constants()

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, D) uint8 to (B, P, C)."""
        return _tensor(self.proj(self.normalise(patches).to(self.proj.weight.dtype)))


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        return _tensor(self.fc2(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm, scaled by LayerScale and stochastic depth, added to its input.

    One compiled graph serves all blocks, so nothing here may be a Python value that differs from block to block:
    torch.compile builds such values into the graph, and compiles anew for each.
    """

    ran_uncompiled = False
    """Whether it was ever run as plain PyTorch, compiled or not: torch.compile falls back to that."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        rows = relative_position_rows(config.grid) if config.block_positions else None
        self.attn = Attention(width, config.heads, rows)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((width,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((width,), config.layer_scale))

    def forward(self, x: Tensor, bias: Tensor | None, factors: Tensor | None) -> Tensor:
        """(B, N, C) to (B, N, C).

        ``bias`` is that of :meth:`Attention.forward`; ``factors`` (B, 2) multiply the attention and the MLP branch
        of a sample.
        """
        if not torch.compiler.is_compiling():
            self.ran_uncompiled = True
        keep_1 = keep_2 = None
        if factors is not None:
            keep_1, keep_2 = factors[:, :, None, None].unbind(1)
        x = _add_branch(x, self.attn(self.norm1(x), bias), self.gamma_1, keep_1)
        return _add_branch(x, self.mlp(self.norm2(x)), self.gamma_2, keep_2)


class BeitBackbone(nn.Module):
    """Patches to one vector per token; the mask token takes the place of masked patches.

    Args:
        config: sizes and variant.
        recompute: keep only each block's input for the backward pass, and run the block again there.
        masks: whether it has a mask token.
        final_norm: whether the last block's output is normalised.
    """

    kept_gains: Tensor
    relative_position_index: Tensor | None

    def __init__(
        self, config: BackboneConfig, *, recompute: bool = False, masks: bool = True, final_norm: bool = True
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width)) if masks else None
        self.pos_embed = None
        if config.absolute_positions:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, config.width))
        self.patch_embed = PatchEmbedding(config)
        self.rel_pos_bias = None
        index = relative_position_index(config.grid) if config.block_positions else None
        self.register_buffer("relative_position_index", index, persistent=False)
        if config.relative_positions and not config.block_positions:
            self.rel_pos_bias = RelativePositionBias(config.grid, config.heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.register_buffer("kept_gains", self._kept_gains(), persistent=False)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS) if final_norm else None

    def embed(self, patches: Tensor, masked: Tensor | None = None) -> Tensor:
        """What the first block gets, (B, 1 + P, C); arguments as of :meth:`encode`."""
        x = _tensor(self.patch_embed(patches))
        if masked is not None and self.mask_token is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        if self.pos_embed is not None:  # after masking: a mask token knows where it is
            x = x + self.pos_embed
        return x

    def encode(self, patches: Tensor, masked: Tensor | None = None, keeps: Tensor | None = None) -> Tensor:
        """Run the backbone.

        Args:
            patches: (B, P, D) uint8 as they lie in a shard.
            masked: (B, P) bool, the patches to hide behind the mask token; None hides none.
            keeps: (B, depth, 2), 1 where a residual branch (attention, MLP) is kept and 0 where stochastic depth
                drops it. Kept ones are divided by the probability of that. None keeps all and scales none.

        Returns:
            (B, 1 + P, C) after the final norm, if there is one, the class token first.
        """
        for x in self.layers(patches, masked, keeps):
            last = x
        return last if self.norm is None else _tensor(self.norm(last))

    def layers(
        self, patches: Tensor, masked: Tensor | None = None, keeps: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The output (B, 1 + P, C) of each block, one after the other; arguments as of :meth:`encode`."""
        x = self.embed(patches, masked)
        bias = self._position_bias()
        scaled = None if keeps is None else keeps.to(x.dtype) * self.kept_gains.to(x.dtype)
        for index, block in enumerate(self.blocks):
            factors = None if scaled is None else scaled[:, index]
            if self.recompute:
                # Nothing in a block is drawn, so there is no state of a generator to put back.
                x = checkpoint(block, x, bias, factors, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, bias, factors)
            yield x

    def attention(self, patches: Tensor, layer: int) -> Tensor:
        """How much each token attends to each in block ``layer``, from 1: fp32 (B, H, N, N), rows are queries."""
        x = self.embed(patches)
        for number, output in enumerate(self.layers(patches) if layer > 1 else (), start=2):
            x = output
            if number == layer:
                break
        block = self.blocks[layer - 1]
        assert isinstance(block, Block)
        return block.attn.shares(block.norm1(x), self._position_bias())

    def forward(self, patches: Tensor, masked: Tensor | None = None, keeps: Tensor | None = None) -> Tensor:
        """See :meth:`encode`."""
        return self.encode(patches, masked, keeps)

    def reset_constants(self) -> None:
        """Compute all buffers anew, for a module that was built on the meta device."""
        self.kept_gains.copy_(self._kept_gains())
        self.patch_embed.reset_constants()
        if self.relative_position_index is not None:
            self.relative_position_index.copy_(relative_position_index(self.config.grid))
        if self.rel_pos_bias is not None:
            self.rel_pos_bias.reset_constants()

    def _position_bias(self) -> Tensor | None:
        """What each block gets beside its input; see :meth:`Attention.forward`."""
        return self.relative_position_index if self.rel_pos_bias is None else _tensor(self.rel_pos_bias())

    def _kept_gains(self) -> Tensor:
        """(depth, 1): by how much each block scales a branch that stochastic depth keeps."""
        gains = [[1 / (1 - rate)] for rate in self.config.drop_path_rates]
        return torch.tensor(gains, dtype=torch.float32)


def _add_branch(x: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    """``x + branch · gamma · keep``; the small factors first, so that activations are passed over once."""
    factor = gamma if keep is None else keep if gamma is None else gamma * keep
    if factor is None:
        return x + branch
    return torch.addcmul(x, branch, factor)


def _tensor(value: Tensor) -> Tensor:
    """What a submodule returned: ``nn.Module.__call__`` is typed to return anything."""
    return value
