"""The public operators. Each runs on the fastest backend that can; ``bti_fast.backend`` forces one."""

from bti_fast.ops.cross_attention import CrossAttention, cross_attention
from bti_fast.ops.dispatch import OPERATORS, backend
from bti_fast.ops.entropy_uncertainty import entropy_uncertainty
from bti_fast.ops.gated_fusion import GatedFusion, gated_fusion
from bti_fast.ops.task_interaction import TaskInteraction, task_interaction
from bti_fast.reference import TaskInteractionWeights

__all__ = [
    "OPERATORS",
    "CrossAttention",
    "GatedFusion",
    "TaskInteraction",
    "TaskInteractionWeights",
    "backend",
    "cross_attention",
    "entropy_uncertainty",
    "gated_fusion",
    "task_interaction",
]
