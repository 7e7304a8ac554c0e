"""The embedded engine: a prompt prefilled once a group, decoding from a shared key-value cache."""
