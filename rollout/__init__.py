"""Engines that sample groups of completions: one protocol, several implementations."""
