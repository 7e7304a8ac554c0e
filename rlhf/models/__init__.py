"""Models of transformers: loading, packing, heads, LoRA adapters, sharding, and a self-test."""
