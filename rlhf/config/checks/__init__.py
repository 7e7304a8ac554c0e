"""Checks between settings, made before anything is loaded."""
