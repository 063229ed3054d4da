"""The discrete VAE of DALL-E: images to visual tokens and back.

The architecture is that of the published encoder and decoder (arXiv 2102.12092, appendix A.1): pre-activation
residual blocks without normalisation or dropout, so that training and inference compute the same thing. The
parameters carry OpenAI's names (``blocks.group_2.block_1.res_path.conv_3.w``), so that converted weights load
without a table. At the sizes of :class:`DVAEConfig`'s defaults the encoder has 53,786,240 parameters and the
decoder 43,829,766.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_dist.config.dvae import DVAEConfig
from beit_dist.errors import TokenizerError

STRIDE = 8
"""Pixels of an image side per token: three of the four groups halve the resolution."""
GROUPS = 4
LOGIT_LAPLACE_EPS = 0.1
"""Pixels are mapped to [eps, 1 - eps], where the logit-Laplace density is bounded (DALL-E paper, A.3)."""

Precision = Literal["fp32", "fp16", "bf16"]
"""In what the encoder's residual paths are computed when tokens are made; all else is fp32."""
_LOW: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def map_pixels(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] to [0.1, 0.9], the range the dVAE works in."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * pixels + LOGIT_LAPLACE_EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of :func:`map_pixels`, clamped to [0, 1]."""
    return ((mapped - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)


def relax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Gumbel-softmax over dimension 1: a differentiable sample that nears a one-hot as ``temperature`` falls."""
    return torch.softmax((logits + noise) / temperature, dim=1)


class Conv(nn.Module):
    """A convolution that keeps height and width, with OpenAI's parameter names ``w`` and ``b``.

    ``full_precision`` runs it in fp32 also under autocast, as OpenAI does for the encoder's last convolution
    and the decoder's first: the argmax over the logits should not depend on rounding.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, full_precision: bool = False) -> None:
        super().__init__()
        self.full_precision = full_precision
        self.w = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.b = nn.Parameter(torch.empty(outputs))

    def initialise(self, generator: torch.Generator) -> None:
        """w ~ N(0, 1 / (inputs · kernel²)), b = 0 (OpenAI's initialisation)."""
        with torch.no_grad():
            self.w.normal_(0, 1 / math.sqrt(self.w[0].numel()), generator=generator)
            self.b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``(B, inputs, H, W)``; returns ``(B, outputs, H, W)``."""
        padding = (self.w.shape[-1] - 1) // 2
        if not self.full_precision or x.is_meta:  # a look at shapes; there is no autocast there
            return F.conv2d(x, self.w, self.b, padding=padding)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=padding)


class Block(nn.Module):
    """``id(x) + gain · res(x)``, where res is four ReLU-convolution pairs a quarter as wide as the output."""

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        inner = outputs // 4
        widths = (inputs, inner, inner, inner, outputs)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    ran_uncompiled = False
    """Whether it was ever run as plain PyTorch, compiled or not: torch.compile falls back to that."""

    def forward(self, x: Tensor, low: torch.dtype | None = None) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, H, W)``, with the residual path in ``low`` if given."""
        if not torch.compiler.is_compiling():
            self.ran_uncompiled = True
        with torch.autocast(x.device.type, low) if low is not None else contextlib.nullcontext():
            residual = self.res_path(x)
        # One fused pass; in place of `id + gain * res`, which would write the product to memory first.
        return torch.add(self.id_path(x), residual, alpha=self.gain)


def _group(
    widths: list[int], kernels: tuple[int, int, int, int], gain: float, resample: nn.Module | None
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(len(widths) - 1):
        layers[f"block_{i + 1}"] = Block(widths[i], widths[i + 1], kernels, gain)
    if resample is not None:
        layers["resample"] = resample
    return nn.Sequential(layers)


def _gain(config: DVAEConfig) -> float:
    """The residual paths' constant ``1 / layers²``: 1/64 at the published size."""
    return 1 / (GROUPS * config.blocks_per_group) ** 2


class Encoder(nn.Module):
    """Images to logits over the vocabulary, one position for each 8×8 pixels."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        hidden, blocks = config.hidden, config.blocks_per_group
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(3, hidden, 7))
        width = hidden
        for group in range(GROUPS):
            outputs = hidden * 2**group
            pool = nn.MaxPool2d(2) if group < GROUPS - 1 else None
            layers[f"group_{group + 1}"] = _group([width] + [outputs] * blocks, (3, 3, 3, 1), _gain(config), pool)
            width = outputs
        last = Conv(width, config.vocabulary, 1, full_precision=True)
        layers["output"] = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", last)]))
        self.blocks = nn.Sequential(layers)

    def forward(self, x: Tensor, low: torch.dtype | None = None) -> Tensor:
        """Mapped pixels ``(B, 3, H, W)`` in [0.1, 0.9] to fp32 logits ``(B, V, H/8, W/8)``.

        Args:
            low: type of the residual paths alone. They are 84 % of the work and reach the logits through the
                blocks' small gain only, so their rounding hardly does. What is rounded on the main path,
                from the first convolution through the sums to the logits, turns one token in fifty in bf16.

        Raises:
            ValueError: the shape is not that of a batch of images whose sides are multiples of 8.
        """
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % STRIDE or x.shape[3] % STRIDE:
            raise ValueError(f"images: got shape {tuple(x.shape)}, expected (B, 3, H, W), H and W multiples of 8")
        return _follow(self.blocks, x, low)


def _follow(layers: nn.Sequential, x: Tensor, low: torch.dtype | None) -> Tensor:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            x = _follow(layer, x, low)
        else:
            x = layer(x, low) if isinstance(layer, Block) else layer(x)
    return x


class Decoder(nn.Module):
    """Tokens, one-hot or relaxed, to the parameters of each pixel's logit-Laplace distribution."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        hidden, blocks = config.hidden, config.blocks_per_group
        width = config.decoder_input
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            input=Conv(config.vocabulary, width, 1, full_precision=True)
        )
        for group in range(GROUPS):
            outputs = hidden * 2 ** (GROUPS - 1 - group)
            upsample = nn.Upsample(scale_factor=2, mode="nearest") if group < GROUPS - 1 else None
            layers[f"group_{group + 1}"] = _group(
                [width] + [outputs] * blocks, (1, 3, 3, 3), _gain(config), upsample
            )
            width = outputs
        layers["output"] = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", Conv(width, 6, 1))]))
        self.blocks = nn.Sequential(layers)

    def forward(self, relaxed: Tensor) -> Tensor:
        """``(B, V, h, w)`` to ``(B, 6, 8h, 8w)``: location (3 channels) and log-scale (3) of each pixel."""
        parameters: Tensor = self.blocks(relaxed)
        return parameters

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """The same for hard tokens, int ``(B, h, w)``: the first convolution becomes a table look-up."""
        first = self.blocks[0]
        if not isinstance(first, Conv):
            raise TypeError("the decoder's first layer is not a convolution")
        x = F.embedding(tokens, first.w[:, :, 0, 0].t()) + first.b
        parameters: Tensor = self.blocks[1:](x.permute(0, 3, 1, 2))
        return parameters


class DVAE(nn.Module):
    """Encoder and, unless ``config.decoder_input`` is 0, decoder.

    Args:
        config: the sizes.
        seed: of the initial weights, which are the same on every machine.
    """

    def __init__(self, config: DVAEConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config) if config.decoder_input else None
        self.digest = ""
        """Of the file the weights were loaded from; empty for any other model."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, Conv) and not module.w.is_meta:
                module.initialise(generator)

    def forward(
        self,
        mapped: Tensor,
        noise: Tensor | None = None,
        temperature: float = 1.0,
        low: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the training objective is computed from: relaxed tokens, decoded.

        Args:
            mapped: pixels ``(B, 3, H, W)`` in [0.1, 0.9].
            noise: Gumbel noise ``(B, V, H/8, W/8)``; None leaves the decoder out.
            temperature: of the relaxation.
            low: type in which the convolutions are computed, but for the two next to the tokens. In here, as
                DeepSpeed's engine turns an autocast around it off.

        Returns:
            Logits ``(B, V, H/8, W/8)`` in fp32, and the decoder's output ``(B, 6, H, W)``.
        """
        with torch.autocast(mapped.device.type, low) if low is not None else contextlib.nullcontext():
            logits: Tensor = self.encoder(mapped)
            return logits, None if noise is None else self.whole_decoder()(relax(logits, noise, temperature))

    @torch.no_grad()
    def tokens(self, images: Tensor, precision: Precision = "fp32") -> Tensor:
        """The visual tokens of uint8 images ``(B, 3, H, W)``: int64 ``(B, H/8, W/8)`` in [0, vocabulary).

        The likeliest token of each position, nothing is sampled. ``fp16`` and ``bf16`` compute the residual
        paths in that type: faster where the device has it, and a near-tie may then fall the other way.

        Raises:
            ValueError: the images are not uint8, or their sides not multiples of 8.
            TokenizerError: a logit is not finite.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"images: got {images.dtype}, expected uint8")
        with inference_arithmetic(images.device):
            tokens, finite = self.likeliest(images, precision)
        check_finite(finite, precision)
        return tokens

    def likeliest(self, images: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
        """What :meth:`tokens` computes, and whether all logits are finite: what can be compiled as a whole.

        To be called inside :func:`inference_arithmetic`, without gradients.
        """
        mapped = map_pixels(images.float() / 255).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.encoder(mapped, _LOW.get(precision))
        likeliest, tokens = logits.max(dim=1)
        return tokens, likeliest.isfinite().all()

    def whole_decoder(self) -> Decoder:
        """The decoder.

        Raises:
            TokenizerError: this tokenizer has no decoder.
        """
        if self.decoder is None:
            raise TokenizerError(
                "tokenizer: got one without a decoder, which cannot draw tokens, expected one with a decoder. "
                "Convert the encoder together with its decoder: beit convert encoder.pkl decoder.pkl"
            )
        return self.decoder

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """The images of tokens, int ``(B, h, w)``: float32 ``(B, 3, 8h, 8w)`` in [0, 1].

        Raises:
            TokenizerError: there is no decoder.
        """
        decoder = self.whole_decoder()
        with inference_arithmetic(tokens.device):
            location = decoder.from_tokens(tokens)[:, :3]
        return unmap_pixels(torch.sigmoid(location))


def check_finite(finite: Tensor, precision: Precision) -> None:
    """Refuse tokens of logits that are not finite.

    Raises:
        TokenizerError: ``finite`` is false.
    """
    if not bool(finite):
        raise TokenizerError(
            f"tokenizer: got logits that are not finite in {precision}, expected finite ones. Use --precision "
            "fp32. If that does not help, the weights are damaged: convert or train them again"
        )


@contextlib.contextmanager
def inference_arithmetic(device: torch.device) -> Iterator[None]:
    """fp32 that is fp32 (no TF32, no autocast from outside); the same algorithm in every call."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(
                torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            )
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
