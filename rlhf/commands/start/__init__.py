"""Commands to start with: the quickstart, and a first config or reward function of one's own."""
