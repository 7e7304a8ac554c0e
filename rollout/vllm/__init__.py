"""vLLM as an engine: in this process, or as servers that are started, watched and sent weights."""
