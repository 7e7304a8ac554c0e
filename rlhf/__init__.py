"""Tandem: reinforcement learning for language models."""
