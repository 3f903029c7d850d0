"""Cluster embeddings: k-means, flat and hierarchical."""
