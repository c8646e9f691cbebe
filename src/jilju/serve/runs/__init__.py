"""Runs: what is kept of a call's text and tokens for a while, and the page data made of it and of the log."""
