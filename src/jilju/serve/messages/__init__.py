"""Messages: the family of POST /v1/messages, Anthropic's, translated into a chat and back."""
