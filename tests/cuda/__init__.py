"""Tests of the GPU backend: in Triton's interpreter where there is no GPU, on the GPU where there is one."""
