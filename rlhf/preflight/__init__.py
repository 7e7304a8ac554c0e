"""Everything a run checks, reads and estimates before it loads weights; `rlhf check` does only this."""
