"""Implementations of the operators: interfaces, PyTorch and Triton engines, and the selection of one."""
