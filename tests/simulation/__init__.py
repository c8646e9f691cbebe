"""Tests of the simulation: scripts, planted bugs, shrinking, and that a run is the same each time."""
