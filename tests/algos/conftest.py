"""Laws are checked without a deadline: it would be a timed assertion."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("algos", deadline=None, max_examples=40)
settings.load_profile("algos")
