"""What the `rlhf` command does beside training: evaluate, report, export, and say what is installed."""
