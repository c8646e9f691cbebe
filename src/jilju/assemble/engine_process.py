"""The program of the engine's process: `python -m jilju.assemble.engine_process OPTIONS FD`.

OPTIONS is EngineOptions as JSON, FD the file descriptor of the link, appended by who starts it. Runs until the link ends.
"""

import gc
import logging
import os
import socket
import sys

import msgspec

from jilju.assemble.engine import EngineOptions, build_engine
from jilju.engine.link import LoadProgress, serve_engine
from jilju.engine.loop import Engine


def main(options: str, descriptor: str) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s engine %(levelname)s %(message)s")
    engine_options = msgspec.json.decode(options, type=EngineOptions)
    if engine_options.device is not None:  # the GPU that was planned for: CUDA may count them in another order
        os.environ["CUDA_VISIBLE_DEVICES"] = engine_options.device.uuid

    def load(progress: LoadProgress) -> Engine:
        engine = build_engine(engine_options, progress=progress, makes_grammars_beside=True)
        gc.freeze()  # what was loaded stays: a full collection in the middle of a step would walk over all of it
        return engine

    serve_engine(load, socket.socket(fileno=int(descriptor)))


if __name__ == "__main__":
    main(*sys.argv[1:])
