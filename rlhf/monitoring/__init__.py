"""What a run shows and writes: progress display, metrics, samples, warnings, the run folder, reports."""
