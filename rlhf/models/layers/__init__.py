"""Replacements for layers of transformers: shared-prefix attention; norms and MLPs that keep less."""
