"""Lightning, imported so that an absent or broken torchvision does not matter."""

from __future__ import annotations

import importlib.util
import logging
import warnings


def _hide_broken_torchvision() -> None:
    """torchmetrics takes an installed torchvision for a working one; tell it when importing it fails."""
    try:
        if importlib.util.find_spec("torchvision") is None:
            return
        import torchvision  # noqa: F401
    except Exception as cause:  # a torchvision of another torch raises RuntimeError, OSError, ...
        from lightning_utilities.core.imports import RequirementCache

        logging.getLogger(__name__).debug("torchvision does not import (%s); continuing without it", cause)
        check = RequirementCache._check_available
        reason = f"torchvision does not import: {cause}"

        def check_available(self: RequirementCache) -> None:
            if (self.requirement or self.module or "").startswith("torchvision"):
                self.available, self.message = False, reason
            else:
                check(self)

        RequirementCache._check_available = check_available


_hide_broken_torchvision()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as lightning
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.strategies import DDPStrategy

for _name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # its hardware report and advertisements

__all__ = ["DDPStrategy", "MixedPrecision", "lightning"]
