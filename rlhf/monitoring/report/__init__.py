"""RUN/report.html, the comparison of several runs, and the closing summary."""
