"""Semantic balance: find near-duplicates, keep one of each group."""
