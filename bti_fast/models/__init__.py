"""BTI-Net, its encoders, and the converter of published weights."""

from bti_fast.models.btinet import BTINet, BTINetOutput
from bti_fast.models.encoders import EfficientNetEncoder

__all__ = ["BTINet", "BTINetOutput", "EfficientNetEncoder"]
