"""Every operator in plain PyTorch: the meaning of the fast paths, and the fallback where none can run."""

from bti_fast.reference.cross_attention import cross_attention, cross_attention_backward
from bti_fast.reference.entropy_uncertainty import entropy_uncertainty, entropy_uncertainty_backward
from bti_fast.reference.gated_fusion import gated_fusion, gated_fusion_backward
from bti_fast.reference.task_interaction import (
    TaskInteractionWeights,
    task_interaction,
    task_interaction_backward,
)

__all__ = [
    "TaskInteractionWeights",
    "cross_attention",
    "cross_attention_backward",
    "entropy_uncertainty",
    "entropy_uncertainty_backward",
    "gated_fusion",
    "gated_fusion_backward",
    "task_interaction",
    "task_interaction_backward",
]
