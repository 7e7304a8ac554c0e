"""The engines `vllm` (in this process) and `vllm-server` (servers that are started, watched and updated)."""
