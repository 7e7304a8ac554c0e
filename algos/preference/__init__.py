"""Losses that compare completions: which ones, by what score, with what loss, and the methods by name."""
