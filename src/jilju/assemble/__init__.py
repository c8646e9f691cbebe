"""The composition root: the only place that names concrete classes. In parts, so that the engine's process stays light.

`engine` makes what computes (model file, plan, backend, Engine); `text` what reads and writes text (tokenizer, template); `server`
puts the HTTP server together around a supervised engine; `engine_process` is the program of the engine's own process. Others are
handed the parts.
"""
