"""Training, evaluation and prediction: what the command line does, as functions.

from bti_fast.engine import TrainConfig, train
run = train(TrainConfig(data="BUSI", out="runs/first"))
"""

import sys
from types import ModuleType

from bti_fast.engine.config import AblateConfig, TrainConfig
from bti_fast.engine.run_config import CalibrateConfig, EvaluateConfig, FailuresConfig, PredictConfig

_FUNCTIONS = ("ablate", "calibrate", "evaluate", "failures", "predict", "train")
__all__ = [
    "AblateConfig",
    "CalibrateConfig",
    "EvaluateConfig",
    "FailuresConfig",
    "PredictConfig",
    "TrainConfig",
    *_FUNCTIONS,
]


def __getattr__(name: str):  # the functions pull in torch and Lightning, the settings must not
    if name in _FUNCTIONS:
        import importlib

        function = getattr(importlib.import_module(f"bti_fast.engine.{name}"), name)
        globals()[name] = function
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Engine(ModuleType):
    """Keeps importing bti_fast.engine.train from hiding the function of that name behind the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Engine
