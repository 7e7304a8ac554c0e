"""Datasets of prompts, completions, pairs and texts, and the order in which a run goes through them."""
