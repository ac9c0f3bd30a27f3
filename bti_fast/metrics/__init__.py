"""Metrics of BTI-Net and their policies (SPEC §7), on plain numbers: no torch, no model."""

from bti_fast.metrics.baselines import majority_class_baseline, mean_mask_baseline
from bti_fast.metrics.classes import (
    ECE_BINS,
    expected_calibration_error,
    reliability_curve,
    roc_curves,
)
from bti_fast.metrics.failure import failure_aurc, failure_auroc, risk_coverage
from bti_fast.metrics.masks import CaseMetrics, case_metrics, hausdorff95
from bti_fast.metrics.rows import SIGNALS, CaseRow, failure_signals, is_failure, predicted_class
from bti_fast.metrics.summary import format_value, render_summary, summarise

__all__ = [
    "ECE_BINS",
    "SIGNALS",
    "CaseMetrics",
    "CaseRow",
    "case_metrics",
    "expected_calibration_error",
    "failure_aurc",
    "failure_auroc",
    "failure_signals",
    "format_value",
    "hausdorff95",
    "is_failure",
    "majority_class_baseline",
    "mean_mask_baseline",
    "predicted_class",
    "reliability_curve",
    "render_summary",
    "risk_coverage",
    "roc_curves",
    "summarise",
]
