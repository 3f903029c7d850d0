"""Checkpoints: the directory protocol, their contents, and saving by all ranks."""
