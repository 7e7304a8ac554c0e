"""Images: opened, encoded by the processor of a model, and put among its token embeddings."""
