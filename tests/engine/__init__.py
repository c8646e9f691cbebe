"""Tests of the engine: a hash-chain executor, its oracle, and the laws that hold between them."""
