"""The subcommands of `rlhf` other than `train`: check, eval, report, export, combine, pairs, doctor."""
