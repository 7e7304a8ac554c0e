"""Images: read from datasets, prepared by a model's processor, and put among its token embeddings."""
