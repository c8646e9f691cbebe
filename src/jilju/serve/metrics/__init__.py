"""Metrics: what /metrics tells Prometheus. Folds over the ledger of calls and the engine's log, and the text they are shown as."""
