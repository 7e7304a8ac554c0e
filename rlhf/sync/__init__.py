"""Weights from the learner to the engine, and the probe that both have the same."""
