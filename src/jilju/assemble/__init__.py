"""The composition root: the only place that names concrete classes. In parts, so that the engine's process stays light.

`engine` makes what computes (model file, plan, backend, Engine); `text` what reads and writes text (tokenizer, template);
`launch` starts the engine's own process, whose program is `engine_process`; `server` puts the HTTP server together around it.
Others are handed the parts.
"""
