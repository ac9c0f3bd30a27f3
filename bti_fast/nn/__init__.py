"""Modules: the drop-in interaction and its parts, and the paper's convolutional blocks."""

from bti_fast.nn.blocks import (
    AttentionGate,
    DualPathAttention,
    MultiScaleContextFusion,
    ResidualBlock,
    SeparableConv,
)
from bti_fast.nn.cross_decoder_attention import CrossDecoderAttention, CrossDecoderAttentionOutput
from bti_fast.nn.interaction import FixedInteraction, GatedInteraction, GatedInteractionOutput
from bti_fast.nn.task_interaction import (
    TaskInteraction,
    TaskInteractionOutput,
    UncertaintyProxyAttention,
    UncertaintyProxyOutput,
)

__all__ = [
    "AttentionGate",
    "CrossDecoderAttention",
    "CrossDecoderAttentionOutput",
    "DualPathAttention",
    "FixedInteraction",
    "GatedInteraction",
    "GatedInteractionOutput",
    "MultiScaleContextFusion",
    "ResidualBlock",
    "SeparableConv",
    "TaskInteraction",
    "TaskInteractionOutput",
    "UncertaintyProxyAttention",
    "UncertaintyProxyOutput",
]
