"""The NVIDIA GPU backend: torch for memory and large matrix products, Triton for the rest.

Importing this package imports no torch: `device`, `memory` and `lowering` plan without it, the rest is imported when an
engine is made.
"""
