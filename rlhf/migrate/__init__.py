"""Turns a script or config of verl or TRL into a config of ours: `rlhf migrate FILE`."""
