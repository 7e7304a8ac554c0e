"""Models of transformers: loading, packing, heads, adapters, shards, and their self-test."""
