"""The HTTP server: one module per API family, streams, auth, limits, metrics. Sees only types of text and engine."""
