"""Processes in which reward functions run, so that one that hangs or crashes costs its sample alone."""
