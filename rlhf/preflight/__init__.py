"""Everything that can be known of a run before weights are loaded; `rlhf check` is nothing else."""
