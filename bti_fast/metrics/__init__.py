"""Metrics of BTI-Net and their policies (SPEC §7), on plain numbers: no torch, no model."""

from bti_fast.metrics.baselines import majority_class_baseline, mean_mask_baseline
from bti_fast.metrics.bootstrap import auroc_interval, paired_interval
from bti_fast.metrics.calibration import (
    HIGHEST_TEMPERATURE,
    fit_temperature,
    negative_log_likelihood,
    scaled_probabilities,
)
from bti_fast.metrics.classes import (
    ECE_BINS,
    expected_calibration_error,
    reliability_bins,
    reliability_curve,
    roc_curves,
)
from bti_fast.metrics.failure import failure_aurc, failure_auroc, risk_coverage, signals_and_failures
from bti_fast.metrics.masks import CaseMetrics, case_metrics, hausdorff95
from bti_fast.metrics.referral import Referral, choose_threshold, judge_threshold
from bti_fast.metrics.rows import SIGNALS, CaseRow, failure_signals, is_failure, predicted_class
from bti_fast.metrics.summary import format_value, render_summary, summarise

__all__ = [
    "ECE_BINS",
    "HIGHEST_TEMPERATURE",
    "SIGNALS",
    "CaseMetrics",
    "CaseRow",
    "Referral",
    "auroc_interval",
    "case_metrics",
    "choose_threshold",
    "expected_calibration_error",
    "failure_aurc",
    "failure_auroc",
    "failure_signals",
    "fit_temperature",
    "format_value",
    "hausdorff95",
    "is_failure",
    "judge_threshold",
    "majority_class_baseline",
    "mean_mask_baseline",
    "negative_log_likelihood",
    "paired_interval",
    "predicted_class",
    "reliability_bins",
    "reliability_curve",
    "render_summary",
    "risk_coverage",
    "roc_curves",
    "scaled_probabilities",
    "signals_and_failures",
    "summarise",
]
