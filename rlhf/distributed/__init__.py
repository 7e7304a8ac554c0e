"""Several ranks: their sums, the watch over each other, and weights cut into shards."""
