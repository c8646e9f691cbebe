"""What the server and its worker processes say to each other, and the workers' side of it.

Owns the messages, the frames (u32 length, msgpack) and the limit on a job's memory. Knows nothing of grammars or templates: a
worker is handed functions that do its jobs, a server sees `jilju.serve.workers`.
"""

import os
import resource
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from jilju.errors import GrammarTooComplex, InternalError, JiljuError, TemplateFailed
from jilju.text.grammar import GrammarSource

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20  # a body of 8 MiB, rendered to four times of it


class Compile(msgspec.Struct, frozen=True, tag="compile"):
    source: GrammarSource


class Render(msgspec.Struct, frozen=True, tag="render"):
    messages: list[dict[str, Any]]
    options: dict[str, Any]  # of ChatTemplate.render
    template: str | None = None  # None: the model's own


class Begun(msgspec.Struct, frozen=True, tag="begun"):
    """The worker has loaded what the job needs: from here on its time runs and its memory counts."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    text: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    code: str
    message: str
    param: str | None = None


Job: TypeAlias = Compile | Render
Reply: TypeAlias = Begun | Done | Refused


class FrameTooLarge(Exception):
    pass


def frame(message: Job | Reply) -> bytes:
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"a message of {len(body)} bytes; a frame has room for {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


def serve_jobs(sock: socket.socket, prepare: Callable[[Job], Callable[[], str]], memory_bytes: int) -> None:
    """Do jobs, one at a time, until the link ends. `prepare` loads what a job needs, once, and gives what does it.

    A job may add `memory_bytes` to the process; after one that leaves it more than half of that larger, the process ends.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    decoder = msgspec.msgpack.Decoder(Job)
    while (body := _receive(sock)) is not None:
        job = decoder.decode(body)
        do = prepare(job)
        sock.sendall(frame(Begun()))
        base = _size_bytes()
        _limit_memory(base + memory_bytes)
        reply = _reply(job, do)
        _limit_memory(resource.RLIM_INFINITY)
        sock.sendall(reply)
        if _size_bytes() > base + memory_bytes // 2:
            return


def _reply(job: Job, do: Callable[[], str]) -> bytes:
    """The frame of what came of the job."""
    try:
        return frame(Done(do()))
    except JiljuError as error:
        refused = Refused(error.code, error.message, error.param)
    except (MemoryError, RecursionError, FrameTooLarge) as error:
        code = GrammarTooComplex.code if isinstance(job, Compile) else TemplateFailed.code
        refused = Refused(code, f"this takes more than a job is given: {type(error).__name__}")
    except Exception as error:  # a defect, which must not cost the next caller a worker
        refused = Refused(InternalError.code, f"the worker failed: {type(error).__name__}: {str(error)[:200]}")
    return frame(refused)


def _receive(sock: socket.socket) -> bytes | None:
    """The next frame's body; None at the end of the link."""
    head = _read(sock, LENGTH.size)
    return None if head is None else _read(sock, LENGTH.unpack(head)[0])


def _read(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(min(1 << 20, count - len(data)))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _size_bytes() -> int:
    """Of the address space, which the limit is on."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


def _limit_memory(soft: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))
