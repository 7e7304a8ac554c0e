"""Evaluation: accuracy on held-out prompts, confidence intervals, pass@k, and calibration."""
