"""The stages before training: teacher embeddings, clusters, redundancy removal. Each restarts where it stopped."""
