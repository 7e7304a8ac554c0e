"""Settings of verl and TRL turned into ours: for `rlhf migrate`, and for the hint at a key of theirs."""
