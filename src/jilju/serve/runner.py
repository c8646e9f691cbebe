"""The runner: a server process from bind to exit.

Owns the socket, the signals (SIGHUP: the keys are read anew) and the order of an ending: /readyz says 503, new calls are
refused, live ones finish, the rest are told, the engine stops. Knows nothing of routes or of what an engine is.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from jilju.engine.client import EngineClient
from jilju.errors import ConfigError
from jilju.serve.app import app_of
from jilju.serve.context import ServerContext
from jilju.serve.door.transport import protocol_factory
from jilju.serve.server import Server, make_server

logger = logging.getLogger("jilju.serve")

HURRY_S = 0.8  # from a second signal to the end, whatever hangs
LOOK_S = 1.0  # between two looks at the engine's state
SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048


def run_server(
    context: ServerContext,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_listening: Callable[[str], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Serves until a signal ends it; returns the exit code. Raises ConfigError or StartupError when it cannot begin."""
    listener = bind(host, port)
    run = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        run = uvloop.run
    return run(serve(context, listener, on_listening=on_listening, on_ready=on_ready))


def bind(host: str, port: int) -> socket.socket:
    name = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}; choose another") from error
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Uvicorn(uvicorn.Server):
    """Signals are the runner's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    context: ServerContext,
    listener: socket.socket,
    *,
    on_listening: Callable[[str], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Answers (with 503) from the start, takes calls when the engine is ready."""
    server = make_server(context)
    event_file = server.event_file
    if event_file is not None:
        event_file.open()
    http = _Uvicorn(
        uvicorn.Config(
            app_of(server),
            http=protocol_factory(server),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
    )
    ending = _Ending()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, ending.signal, loop)
    hangup = asyncio.Event()
    if context.read_keys is not None:  # without a file to read, a hangup ends a process, as ever
        loop.add_signal_handler(signal.SIGHUP, hangup.set)
    reloading = asyncio.create_task(_reload_keys(server, hangup))
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    starting = asyncio.create_task(context.client.start())
    stop = asyncio.create_task(ending.wanted.wait())
    lost = asyncio.create_task(_lost(context.client))
    beside = [asyncio.create_task(server.loop_lag.watch()), reloading]
    if event_file is not None:
        beside.append(asyncio.create_task(event_file.run()))
    address = address_of(listener)
    try:
        if on_listening is not None:
            on_listening(address)
        await asyncio.wait({starting, stop, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            if on_ready is not None:
                on_ready(address)
            await asyncio.wait({stop, serving, lost}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                logger.error("the engine was given up; ending")
        await _drain(server, ending)
    finally:
        for task in (starting, stop, lost, *beside):
            task.cancel()
        await asyncio.gather(starting, stop, lost, *beside, return_exceptions=True)
        await context.client.stop()
        if context.workers is not None:
            await context.workers.close()
        http.should_exit = True
        http.force_exit = ending.hurry.is_set()
        await serving
        if event_file is not None:
            await event_file.close()
        for number in (*SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)
        if server.telemetry is not None:
            await asyncio.to_thread(server.telemetry.close)
        ending.done()
    return 0 if ending.wanted.is_set() else 1


async def _lost(client: EngineClient) -> None:
    """Returns when the engine, once ready, is given up."""
    while client.info is None or client.status().state != "gone":
        await asyncio.sleep(LOOK_S)


async def _reload_keys(server: Server, hangup: asyncio.Event) -> None:
    """At each hangup. What is wrong is logged, and the old keys stay."""
    while await hangup.wait():
        hangup.clear()
        assert server.context.read_keys is not None, "hangups are handled where there is something to read"
        try:
            keys = await asyncio.to_thread(server.context.read_keys)
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error.message)
            continue
        server.keys.replace(keys)
        server.quotas.keep(keys)
        logger.info("read anew: %d keys (%s)", len(keys), ", ".join(key.name for key in keys))


async def _drain(server: Server, ending: "_Ending") -> None:
    server.drain.begin()
    limit_s = server.context.limits.drain_s
    logger.info("draining: %d calls are live and have %g s", len(server.ledger.live), limit_s)
    empty = asyncio.create_task(server.drain.empty(limit_s))
    hurry = asyncio.create_task(ending.hurry.wait())
    await asyncio.wait({empty, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    empty.cancel()
    await asyncio.gather(hurry, empty, return_exceptions=True)
    if server.ledger.live:
        logger.warning("ending %d calls that are not complete", len(server.ledger.live))
        server.drain.cut_live()
        await server.drain.empty(0.3)


class _Ending:
    """One signal asks for the end, a second for it now."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.hurry = asyncio.Event()
        self._exit: asyncio.TimerHandle | None = None

    def signal(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.wanted.is_set() and not self.hurry.is_set():
            self.hurry.set()
            self._exit = loop.call_later(HURRY_S, os._exit, 1)
        self.wanted.set()

    def done(self) -> None:
        if self._exit is not None:
            self._exit.cancel()
