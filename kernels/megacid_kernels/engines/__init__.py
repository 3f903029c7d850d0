"""Implementations of the operators: the interface, PyTorch, Triton, and the choice between them."""
