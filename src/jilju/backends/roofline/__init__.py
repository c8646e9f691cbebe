"""The roofline backend: time from the cost model, tokens from a hash chain. It computes no model.

`chain` defines the hashes, `slots` keeps them in blocks, `sampling` and `executor` make steps of them; `alone` says what a
request gets by itself, and `plans` makes plans without a model file. The real engine on this executor and a virtual clock
is the simulation.
"""

from jilju.backends.roofline.alone import Alone, AloneRequest, alone
from jilju.backends.roofline.executor import RooflineExecutor
from jilju.backends.roofline.plans import llama_plan, tiny_plan

__all__ = ["Alone", "AloneRequest", "RooflineExecutor", "alone", "llama_plan", "tiny_plan"]
