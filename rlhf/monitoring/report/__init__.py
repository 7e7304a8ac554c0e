"""The HTML report of a run, the comparison of several runs, and the text that a finished run prints."""
