"""Checks of the settings of preference methods."""

from __future__ import annotations


def check_above_zero(**settings: float) -> None:
    """Raises ValueError: a setting is 0 or below."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def check_smoothing(label_smoothing: float) -> None:
    """Raises ValueError: half of all labels would be wrong, or more, or less than none."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be 0 or more and below 0.5, got {label_smoothing}")
