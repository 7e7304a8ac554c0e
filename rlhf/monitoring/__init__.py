"""What a run shows and writes: display, metrics, samples, warnings, the run folder."""
