"""Model towers: the CLIP student, CLIP models loaded for inference, a tower over feature vectors."""
