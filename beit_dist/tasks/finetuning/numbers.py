"""What a fine-tuning says of its steps, and of held-out images."""

from __future__ import annotations

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.step_numbers import Number

LOSS = Number(
    name="loss",
    help="Mean cross-entropy of the images, in nats; in training against mixed and smoothed labels.",
    metric="beit_train_loss",
    held_out="beit_validation_loss",
    text="loss {:.4f}",
    better="lower",
)
ACCURACY = Number(
    name="accuracy",
    help="Share of the images whose class was predicted correctly.",
    metric="beit_train_accuracy_ratio",
    held_out="beit_validation_accuracy_ratio",
    text="accuracy {:.1%}",
    better="higher",
)
TOP5 = Number(
    name="top5_accuracy",
    help="Share of the images whose class is among the five most likely ones.",
    metric="beit_train_top5_accuracy_ratio",
    held_out="beit_validation_top5_accuracy_ratio",
    better="higher",
)
PIXEL_LOSS = Number(
    name="loss",
    help="Mean cross-entropy of the labelled pixels, in nats; in training, including the auxiliary head's.",
    metric="beit_train_loss",
    held_out="beit_validation_loss",
    text="loss {:.4f}",
    better="lower",
)
PIXEL_ACCURACY = Number(
    name="accuracy",
    help="Share of the labelled pixels whose class was predicted correctly.",
    metric="beit_train_accuracy_ratio",
    held_out="beit_validation_accuracy_ratio",
    text="pixel accuracy {:.1%}",
    better="higher",
)
MEAN_IOU = Number(
    name="mean_iou",
    help="Mean over the classes of intersection over union: of all pixels that belong to a class or were "
    "predicted as it, the share for which both are true.",
    held_out="beit_validation_mean_iou_ratio",
    text="mIoU {:.1%}",
    better="higher",
)

CLASSIFIED = (LOSS, ACCURACY, TOP5)
"""What is measured of a classification."""
SEGMENTED = (PIXEL_LOSS, PIXEL_ACCURACY, MEAN_IOU)
"""What is measured of a segmentation."""


def numbers_of(config: FinetuningConfig) -> tuple[Number, ...]:
    """What a step sums: the loss, and how much was right, which of a mixture of two images cannot be said."""
    if config.task == "segmentation":
        return (PIXEL_LOSS, PIXEL_ACCURACY)
    return (LOSS,) if config.mixing.active else (LOSS, ACCURACY)


def measured_of(config: FinetuningConfig) -> tuple[Number, ...]:
    """What is measured on held-out images."""
    return SEGMENTED if config.task == "segmentation" else CLASSIFIED
