"""The launch: settings resolved, announced, and the engine's process on its way.

Owns what is first in a server's start and the command of the engine's process. That process loads the weights while this
one still imports the server's parts and reads the tokenizer, so this module imports neither.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from jilju.assemble.engine import EngineOptions, ModelFile, resolve_engine
from jilju.assemble.fit import MemoryPlan
from jilju.config import ServeConfig
from jilju.engine.link import LoadProgress
from jilju.engine.process import SupervisedClient


@dataclass(frozen=True, slots=True)
class Launched:
    """A model whose engine is loading, with everything resolved."""

    model: ModelFile
    config: ServeConfig
    options: EngineOptions
    client: SupervisedClient


def launch_engine(
    model: ModelFile,
    config: ServeConfig,
    *,
    announce: Callable[[ServeConfig, MemoryPlan], None],
    on_loading: LoadProgress,
) -> Launched:
    """Plan, announce the plan, start the engine's process. Raises StartupError."""
    config, options, memory = resolve_engine(model, config)
    if config.served_model_name is None:
        config = config.with_auto("served_model_name", model.name, "the model's name")
    announce(config, memory)
    client = SupervisedClient(engine_command(options), on_loading=on_loading)
    client.launch()
    return Launched(model, config, options, client)


def engine_command(options: EngineOptions) -> Sequence[str]:
    return (sys.executable, "-m", "jilju.assemble.engine_process", msgspec.json.encode(options).decode())
