"""Measurements of a running engine, and their reports."""
