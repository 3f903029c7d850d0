"""Reading image-text shards: the index, the order, decoding, side tables and the stream of micro-batches."""
