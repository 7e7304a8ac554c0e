"""Checkpoints: what is in one, how it is written whole or not at all, and how it is read back."""
