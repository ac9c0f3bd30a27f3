"""Metrics of BTI-Net and their policies (SPEC §7), on plain numbers: no torch, no model."""

from bti_fast.metrics.rows import SIGNALS, CaseRow, failure_signals, is_failure

__all__ = ["SIGNALS", "CaseRow", "failure_signals", "is_failure"]
