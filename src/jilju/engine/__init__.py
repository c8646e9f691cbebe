"""The engine: requests, sequences, blocks, steps, and the log of what happened. Knows nothing of text, HTTP or kernels."""
