"""``beit_dist.load``: a trained model from wherever it lies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeVar

import torch

from beit_dist.config.finetuning import SegmentationConfig
from beit_dist.config.labelled import AugmentationConfig, SegmentationViewConfig
from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.config.reading import Section, recorded
from beit_dist.engine.device import device_of
from beit_dist.errors import ConfigError, WeightsError
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.fetching import here
from beit_dist.inference.opening import Opened, open_file, open_run
from beit_dist.inference.preparing import Preparation
from beit_dist.inference.pretrained import PretrainedModel
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.models.classifier import ImageClassifier
from beit_dist.models.mim import MaskedImageModel
from beit_dist.models.segmenter import ImageSegmenter
from beit_dist.models.unfilled import unfilled
from beit_dist.models.vit import BeitBackbone
from beit_dist.storage.access import Access
from beit_dist.weights.foreign import named
from beit_dist.weights.origin import as_finetuned

AnyModel = PretrainedModel | ClassificationModel | SegmentationModel
SectionT = TypeVar("SectionT", bound=Section)


def load(
    source: str | PathLike[str],
    *,
    ema: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    access: Access | None = None,
) -> AnyModel:
    """A trained model as an ``nn.Module``, frozen and in evaluation mode.

    What the source does not say and is assumed stands in ``provenance.notes`` and in the model's ``repr``.

    Args:
        source: a run folder, whose newest whole checkpoint is taken, or one of its step folders; a folder that
            ``beit export`` wrote, or one of Hugging Face or timm; a file of weights (.safetensors, .pth, .pt,
            .bin); or a URL of any of these.
        ema: the averaged weights of a run in place of the trained ones.
        device: ``cpu`` (the default), ``cuda``, ``cuda:N``, ``auto``, or a device of torch.
        dtype: fp32 by default; statistics of batch normalisation stay in fp32.
        image_size: another side of the square images, a multiple of the patches' side; positions are resampled as
            in the original's fine-tuning.
        access: how URLs are reached, those of images too.

    Raises:
        CheckpointError: there is no whole checkpoint, it is of a tokenizer, or it holds no average.
        ConfigError: an average is asked of a file; or there is no such device, dtype or ``image_size``.
        WeightsError: there is nothing, or a file that cannot be used.
        StorageError: a store failed for as long as it was tried again.
    """
    access, text = access or Access(), os.fspath(source).removeprefix("file://")
    where, kind = _device(device), torch.float32 if dtype is None else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError("dtype", str(dtype), "torch.float32, torch.bfloat16 or torch.float16")
    with here(text, access) as path:
        if path is not None and ema:
            raise ConfigError("ema", True, "a run, as a file has no average beside its weights", "Leave it out.")
        opened = open_run(text, ema=ema, access=access) if path is None else open_file(path, text)
    network = _network(opened, _sized(opened.config, image_size))
    model = _model(opened, network, access).requires_grad_(False).eval()
    return model.to(where, kind)


def _device(given: str | torch.device | None) -> torch.device:
    if isinstance(given, torch.device) and given.type != "cuda":
        return given
    try:
        return device_of("cpu" if given is None else str(given))
    except ConfigError as error:
        raise error.named("device") from None


def _sized(config: BackboneConfig, image_size: int | None) -> BackboneConfig:
    if image_size is None or image_size == config.image_size:
        return config
    if not isinstance(image_size, int) or image_size < config.patch_size or image_size % config.patch_size:
        raise ConfigError("image_size", image_size, f"a multiple of {config.patch_size}, the side of a patch")
    return config.model_copy(update={"image_size": image_size})


def _network(opened: Opened, config: BackboneConfig) -> BeitBackbone:
    """The network with its weights, fp32 on the CPU."""
    found, classes = opened.found, opened.classes if opened.provenance.kind != "pretraining" else ()

    def build() -> BeitBackbone:
        if opened.provenance.kind == "segmentation":
            return ImageSegmenter(config, len(classes))
        if opened.provenance.kind == "classification":
            return ImageClassifier(config, len(classes))
        if isinstance(config, ModelConfig):
            return MaskedImageModel(config)
        weights = found.weights
        return BeitBackbone(config, masks="mask_token" in weights, final_norm="norm.weight" in weights)

    network = unfilled(build)
    names = network.state_dict().keys()
    with named(opened.provenance.name):
        weights = as_finetuned(found, config, names, classes).weights
        if missing := sorted(names - weights.keys()):
            raise WeightsError(f"got no {missing[0]}, expected all tensors of a BEiT v1 model")
        if strange := sorted(weights.keys() - names):
            raise WeightsError(f"got {strange[0]}, which no BEiT v1 model has")
        network.reset_constants()
        network.load_state_dict(weights, assign=True)
    return network


def _model(opened: Opened, network: BeitBackbone, access: Access) -> AnyModel:
    measured, provenance = opened.measured, opened.provenance
    prepare = Preparation(network.config, _section(AugmentationConfig, measured, "augmentation"), access)
    if isinstance(network, ImageClassifier):
        return ClassificationModel(network, provenance, prepare, opened.classes)
    if isinstance(network, ImageSegmenter):
        views = _section(SegmentationViewConfig, measured, "views")
        settings = _section(SegmentationConfig, measured, "segmentation")
        return SegmentationModel(network, provenance, prepare, opened.classes, views, settings)
    return PretrainedModel(network, provenance, Preparation(network.config, access=access))


def _section(schema: type[SectionT], measured: Mapping[str, Any], name: str) -> SectionT:
    """A section of a recipe, or its defaults."""
    given = measured.get(name)
    return recorded(schema, given) if isinstance(given, Mapping) else schema()
