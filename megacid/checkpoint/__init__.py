"""Checkpoints: the directory protocol, what is saved, who publishes."""
