"""``beit_dist.load``: a trained model from wherever it lies."""

from __future__ import annotations

from os import PathLike

import torch

from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.pretrained import PretrainedModel
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.storage.access import Access


def load(
    source: str | PathLike[str],
    *,
    ema: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    access: Access | None = None,
) -> PretrainedModel | ClassificationModel | SegmentationModel:
    """A trained model as an ``nn.Module``, frozen and in evaluation mode.

    Args:
        source: a run folder, whose newest whole checkpoint is taken, or one of its step folders; a folder that
            ``beit export`` wrote, or one of Hugging Face or timm; a file of weights (.safetensors, .pth, .pt, .bin);
            or a URL of any of these.
        ema: the averaged weights of a run in place of the trained ones.
        device: the CPU by default.
        dtype: fp32 by default; statistics of batch normalisation stay in fp32.
        image_size: another side of the square images, a multiple of the patches' side; positions are resampled as in
            the original's fine-tuning.
        access: how a URL is reached.

    Raises:
        CheckpointError: there is no whole checkpoint, it is of a tokenizer, or it holds no average.
        ConfigError: an average is asked of a file; or no model has such an ``image_size``.
        WeightsError: there is nothing, or a file that cannot be used.
        StorageError: a store failed for as long as it was tried again.
    """
    raise NotImplementedError
