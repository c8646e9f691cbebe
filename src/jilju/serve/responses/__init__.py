"""Responses: the family of POST /v1/responses, translated into a chat and back."""
