"""The composition root: the only place that names concrete classes. Two halves, so that the engine's process stays light.

`engine` makes what computes (model file, plan, backend, Engine); `server` makes what speaks (tokenizer, template, the
supervised engine, the HTTP app); `engine_process` is the program of the engine's own process. Others are handed the parts.
"""
