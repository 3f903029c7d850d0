"""Ranks, collectives and the training engine. Import order: parallel <- collectives <- engine."""
