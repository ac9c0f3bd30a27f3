"""Training, evaluation and prediction: what the command line does, as three functions.

from bti_fast.engine import TrainConfig, train
run = train(TrainConfig(data="BUSI", out="runs/first"))
"""

from bti_fast.engine.config import EvaluateConfig, PredictConfig, TrainConfig

__all__ = ["EvaluateConfig", "PredictConfig", "TrainConfig", "evaluate", "predict", "train"]


def __getattr__(name: str):  # the three functions pull in torch and Lightning, the settings must not
    if name in ("train", "evaluate", "predict"):
        import importlib

        function = getattr(importlib.import_module(f"bti_fast.engine.{name}"), name)
        globals()[name] = function
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
