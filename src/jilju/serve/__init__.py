"""The HTTP server: requests in, events out.

One module per API family (openai_chat, openai_completions, models, tokenize), one pipeline under both generating routes
(generation, stream), the door in front of them (gate, auth, body, fields), and what is told about it (ledger, metrics,
health, request_log). Knows nothing of models, backends or schedulers: it is handed a tokenizer, a template and an engine client.
"""
