"""Text to tokens and back: tokenizers, chat templates, detokenizer, stop strings. Knows nothing of engines or HTTP."""
