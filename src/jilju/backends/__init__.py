"""Backends: the executors that run a plan."""
