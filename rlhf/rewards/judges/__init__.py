"""Pairwise judges and preference models: which of two completions of a prompt is the better one."""
