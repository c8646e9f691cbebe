"""Accounts: folds over the event log. Where a request's time went and who caused it, what it cost, what the engine does now.

Everything here is computed when it is asked for, from records alone: live, from a file, or of a simulation.
"""
