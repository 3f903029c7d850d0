"""Reading image-text shards and feature vectors: the index, the order, decoding, side tables, the stream of micro-batches."""
