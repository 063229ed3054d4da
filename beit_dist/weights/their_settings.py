"""What stands beside the weights: a model's settings as Hugging Face, timm and unilm write them."""

from __future__ import annotations

from typing import Any

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.labelled import AugmentationConfig
from beit_dist.config.model import IMAGENET_MEAN, IMAGENET_STD
from beit_dist.config.reading import recorded
from beit_dist.models.vit import NORM_EPS
from beit_dist.weights.stored import StoredWeights

_RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers."""


def hf_config(stored: StoredWeights, dtype: str) -> dict[str, Any]:
    """``config.json`` for ``BeitForMaskedImageModeling`` or ``BeitForImageClassification``."""
    model = stored.model
    found = {
        "architectures": ["BeitForMaskedImageModeling"],
        "model_type": "beit",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "layer_norm_eps": NORM_EPS,  # Hugging Face's default is another
        "use_mask_token": True,
        "use_absolute_position_embeddings": model.absolute_positions,
        "use_relative_position_bias": model.block_positions,
        "use_shared_relative_position_bias": model.relative_positions and not model.block_positions,
        "layer_scale_init_value": model.layer_scale,
        "drop_path_rate": model.drop_path,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "use_mean_pooling": True,  # else the model would have a second norm before the one of the head
    }
    if stored.classes is None:
        return {**found, "vocab_size": stored.config.model.vocabulary}
    return {
        **found,
        "architectures": ["BeitForImageClassification"],
        "use_mask_token": False,
        "id2label": {str(number): name for number, name in enumerate(stored.classes)},
        "label2id": {name: number for number, name in enumerate(stored.classes)},
        "problem_type": "single_label_classification",
    }


def hf_processor(stored: StoredWeights) -> dict[str, Any]:
    """``preprocessor_config.json``: what was trained on, or how a classification is measured."""
    model, augmentation = stored.model, _augmentation(stored)
    side = {"height": model.image_size, "width": model.image_size}
    found = {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": _RESAMPLE["bicubic"],
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.pixel_mean),
        "image_std": list(model.pixel_std),
    }
    if augmentation is None:
        return found
    shorter = int(model.image_size / augmentation.evaluated_share(model.image_size))
    return {
        **found,
        "size": {"shortest_edge": shorter},
        "resample": _RESAMPLE[augmentation.interpolation],
        "do_center_crop": True,
        "crop_size": side,
    }


def timm_config(stored: StoredWeights) -> dict[str, Any]:
    """``config.json``, from which ``timm.create_model`` makes ``Beit``."""
    model, classes, augmentation = stored.model, stored.classes, _augmentation(stored)
    size, count, pool = model.image_size, len(classes or ()), "token" if classes is None else "avg"
    found = {
        # One that timm knows; where the model is another, the arguments say how.
        "architecture": "beit_large_patch16_224" if model.size == "large" else "beit_base_patch16_224",
        "num_classes": count,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": {
            "global_pool": pool,  # of pre-training, mean pooling would drop the last norm
            "img_size": size,
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
            "init_values": model.layer_scale or None,
            "use_abs_pos_emb": model.absolute_positions,
            "use_rel_pos_bias": model.relative_positions,
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": augmentation.interpolation if augmentation else "bicubic",
            **({"crop_pct": augmentation.evaluated_share(size)} if augmentation else {}),
            "fixed_input_size": True,
            "mean": list(model.pixel_mean),
            "std": list(model.pixel_std),
            "num_classes": count,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return found if classes is None else {**found, "label_names": list(classes)}


def unilm_args(stored: StoredWeights) -> dict[str, Any]:
    """What the original keeps beside the weights, as far as it is known here.

    Plain values: its scripts never read them, and a namespace, as it has there, is refused by ``torch.load`` from
    2.6 on, which by default makes tensors and plain values only.
    """
    model, classes = stored.model, stored.classes
    named = f"beit_{model.size}_patch{model.patch_size}_{model.image_size}"
    return {
        "model": f"{named}_8k_vocab" if classes is None else named,
        "input_size": model.image_size,
        "num_heads": model.heads,  # ours alone; shapes do not tell it where positions are absolute
        "rel_pos_bias": model.relative_positions,
        "abs_pos_emb": model.absolute_positions,
        "layer_scale_init_value": model.layer_scale,
        "drop_path": model.drop_path,
        **({} if classes is None else {"nb_classes": len(classes), "use_mean_pooling": True}),
        "imagenet_default_mean_and_std": (model.pixel_mean, model.pixel_std) == (IMAGENET_MEAN, IMAGENET_STD),
        "pixel_mean": list(model.pixel_mean),
        "pixel_std": list(model.pixel_std),
    }


def _augmentation(stored: StoredWeights) -> AugmentationConfig | None:
    """How a run of classification treats images."""
    if stored.kind != "classification":
        return None
    return recorded(FinetuningConfig, stored.saved.manifest["config"]).augmentation
