"""Worker processes for reward functions: a function that hangs or crashes costs only its own sample."""
