"""Rollout engines, which sample groups of completions: one protocol, several implementations."""
