"""Layers in place of those of transformers: shared-prefix attention, and norms and MLPs that keep less."""
