"""Checkpoints: what they contain, how they are written whole or not at all, and how they are read back."""
