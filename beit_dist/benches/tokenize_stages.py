"""The stages of the offline job, each alone: views against Pillow's, the encoder against the largest product."""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from beit_dist.benches.measuring import Row, in_turn, row
from beit_dist.benches.photos import write_photos
from beit_dist.benches.pillow_views import pillow_view
from beit_dist.config.dvae import DVAEConfig
from beit_dist.images.decoding import patchify
from beit_dist.models.dvae import DVAE
from beit_dist.tokenizing.decoding import BLOCKS, Recipe, keep_blocks
from beit_dist.tokenizing.encoder import DVAEEncoder
from beit_dist.tokenizing.job import Precision

_SIDE = 2048
"""Of the matrices whose product is the ceiling."""
LARGE = (4000, 3000)
"""Pixels of a phone's photograph."""
_VERSIONS = ((1, "pillow"), (1, "simplejpeg"), (2, "pillow"), (2, "simplejpeg"))


class _Size(NamedTuple):
    config: DVAEConfig
    batch: int


def view_rows(folder: Path, quick: bool) -> list[Row]:
    """One view an image, by the processor's time of one core, on ImageNet-sized and on large JPEGs."""
    rows: list[Row] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in decoding processes
    small = [file.read_bytes() for file in write_photos(folder / "stages", 40 if quick else 120)]
    for case, raws in (("views, 500×375", small), ("views, 4000×3000", [_enlarged(raw) for raw in small[:4]])):
        contenders: dict[str, Callable[[], object]] = {"Pillow alone": partial(_each, raws, pillow_view, 0)}
        for version, decoder in _VERSIONS:
            if decoder == "pillow" or importlib.util.find_spec(decoder) is not None:
                recipe = Recipe(1, 224, 112, 16, "random", 0, version, decoder)  # type: ignore[arg-type]
                contenders[f"version {version}, {decoder}"] = partial(_each, raws, partial(_view, recipe), BLOCKS)
        taken = in_turn(contenders, 3 if quick else 7, time.process_time)
        for who, seconds in taken.items():
            rows.append(row("tokenize", case, who, [len(raws) / one for one in seconds], "images/core-s"))
    torch.set_num_threads(threads)
    return rows


def encoder_rows(quick: bool) -> list[Row]:
    """The encoder at 112 px on one device (a CPU: with PyTorch's threads), and its share of the product's rate."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    clock = _cuda_clock if cuda else time.process_time
    precision: Precision = "bf16" if cuda else "fp32"
    product = partial(_product, torch.randn(2, _SIDE, _SIDE, device=device).to(_TYPES[precision]))
    rows: list[Row] = []
    for name, (config, batch) in _sizes(cuda, quick).items():
        images = np.random.default_rng(0).integers(0, 256, (batch, 112, 112, 3), dtype=np.uint8)
        contenders: dict[str, Callable[[], object]] = {"product": product}
        for who in ("plain", "compiled") if cuda else ("plain",):
            model = DVAE(config).requires_grad_(False).eval().to(device)
            contenders[who] = partial(DVAEEncoder(model, precision, compiled=who == "compiled"), images)
        operations = _operations(config, images)
        taken = in_turn(contenders, 2 if quick else 5, clock)
        ceiling = 2 * _SIDE**3 / min(taken.pop("product"))
        for who, seconds in taken.items():
            case = f"encoder, {name}, {device.type}, {precision}"
            rows.append(row("tokenize", case, who, [batch / one for one in seconds], "images/s"))
            shares = [operations / one / ceiling for one in seconds]
            rows.append(row("tokenize", case, who, shares, "of product"))
    return rows


_TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _sizes(cuda: bool, quick: bool) -> dict[str, _Size]:
    if cuda:
        return {"DALL-E": _Size(DVAEConfig(), 256)}
    small = {
        "width 16": _Size(DVAEConfig(vocabulary=512, hidden=16, blocks_per_group=1, decoder_input=0), 64),
        "width 64": _Size(DVAEConfig(hidden=64, decoder_input=0), 16),
    }
    return small if quick else small | {"DALL-E": _Size(DVAEConfig(decoder_input=0), 4)}


def _operations(config: DVAEConfig, images: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    with torch.device("meta"):
        model = DVAE(config)
    with FlopCounterMode(display=False) as counter:
        model.encoder(torch.empty(len(images), 3, 112, 112, device="meta"))
    return int(counter.get_total_flops())


def _product(matrices: torch.Tensor) -> torch.Tensor:
    return matrices[0] @ matrices[1]


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _view(recipe: Recipe, raw: bytes, sample_id: int) -> None:
    patchify(recipe.views_of(raw, sample_id)[0].image, recipe.patch_size)


def _each(raws: Sequence[bytes], make: Callable[[bytes, int], object], blocks: int) -> None:
    keep_blocks(blocks)
    for number, raw in enumerate(raws):
        make(raw, number)


def _enlarged(raw: bytes) -> bytes:
    with Image.open(io.BytesIO(raw)) as image:
        stream = io.BytesIO()
        image.resize(LARGE, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        return stream.getvalue()
