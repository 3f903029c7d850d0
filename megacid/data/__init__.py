"""Reading shards, feature vectors and side tables: a deterministic order, and batches that are never an exception."""
