"""Accuracy on held-out prompts, intervals around it, and calibration."""
