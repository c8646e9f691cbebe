"""Measurements on a GPU: `make bench-gpu`, and what chooses kernels' configurations."""
