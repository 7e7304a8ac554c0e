"""Perception terms (PAPO): passes over masked images, and the watch for signs of KL hacking."""
