"""Triton kernels, a file a group, and the functions that launch them on torch tensors."""
