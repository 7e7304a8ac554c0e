"""Collects the scored groups that a step learns from: by rollouts, from data, or from both."""
