"""Training losses of BTI-Net (SPEC §5), from logits, in fp32 whatever the autocast (fp64 stays fp64)."""

from bti_fast.losses.auxiliary import AUXILIARY_WEIGHT, auxiliary_loss
from bti_fast.losses.classification import class_balanced_weights, classification_loss, focal_cross_entropy
from bti_fast.losses.gates import gate_cross_entropy, gate_loss, gate_losses, minmax_scale, rank_scale
from bti_fast.losses.schedule import loss_weights
from bti_fast.losses.segmentation import (
    boundary_loss,
    curvature_kernel,
    focal_tversky,
    lesion_focus,
    segmentation_loss,
    soft_iou,
    texture_loss,
    tversky_index,
)

__all__ = [
    "AUXILIARY_WEIGHT",
    "auxiliary_loss",
    "boundary_loss",
    "class_balanced_weights",
    "classification_loss",
    "curvature_kernel",
    "focal_cross_entropy",
    "focal_tversky",
    "gate_cross_entropy",
    "gate_loss",
    "gate_losses",
    "lesion_focus",
    "loss_weights",
    "minmax_scale",
    "rank_scale",
    "segmentation_loss",
    "soft_iou",
    "texture_loss",
    "tversky_index",
]
