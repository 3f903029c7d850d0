"""Encoders: the CLIP student, CLIP models loaded for inference, and a tower over feature vectors."""
