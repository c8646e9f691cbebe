"""Chat: the family of POST /v1/chat/completions, into which others translate."""
