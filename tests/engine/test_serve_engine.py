"""The engine's end of the link, in a thread: what it sends, and that it waits for a server that does not read or speak."""

import socket
import threading
import time

from jilju.clock import VirtualClock, WallClock
from jilju.engine import link
from jilju.engine.grammars import Grammars
from jilju.engine.link import (
    LINK_VERSION,
    SILENCE_NS,
    Abort,
    Beat,
    FrameReader,
    FrameWriter,
    Hello,
    Stepped,
    Submit,
    ToServer,
)
from jilju.engine.link import _run_steps as run_steps
from jilju.engine.link import _ServerEnd as ServerEnd
from jilju.engine.loop import Engine
from jilju.engine.request import RequestAborted, RequestFailed, TokenEvent

from .fakes import FakeExecutor, make_limits, oracle, request, tiny_plan
from .held import held, source


class Served:
    """An engine that runs its steps in a thread, and the server's side of its link by hand."""

    def __init__(self, buffer_bytes: int | None = None, grammars: Grammars | None = None):
        self.sock, theirs = socket.socketpair()
        if buffer_bytes is not None:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        limits = make_limits(num_blocks=200)
        self.executor = FakeExecutor(limits)
        self.engine = Engine(tiny_plan(), self.executor, limits, WallClock(), grammars=grammars)
        self._writer, self._reader = FrameWriter(1), FrameReader(ToServer, 1)
        self._end = ServerEnd(theirs, WallClock())
        self.send(Hello(LINK_VERSION))
        assert self._end.greet()
        self._thread = threading.Thread(target=run_steps, args=(self.engine, self._end))
        self._thread.start()

    def send(self, message) -> None:
        self.sock.sendall(self._writer.frame(message))

    def frames(self):
        while True:
            yield from self._reader.feed(self.sock.recv(65536))

    def steps(self):
        return (frame for frame in self.frames() if isinstance(frame, Stepped))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._end.close()
        self.sock.close()
        self._thread.join()


def test_a_frame_carries_a_steps_events_and_names_the_next():
    with Served() as served:
        r = request("a", [1, 2, 3], 3)
        served.send(Submit(r))
        tokens, next_ids, records = [], [], []
        for frame in served.steps():
            tokens += [e.token_id for e in frame.events if isinstance(e, TokenEvent)]
            next_ids.append(frame.next_ids)
            records += frame.records
            if not frame.next_ids:
                break
        assert tokens == oracle(r)[0] and next_ids == [["a"]] * 3 + [[]]
        assert [s.step_id for s in records] == [1, 2, 3]
        assert frame.status.num_running == 0


def test_refusals_and_aborts_come_as_events():
    with Served() as served:
        served.send(Submit(request("long", [1] * 5000)))
        served.send(Submit(request("a", [1], 700)))
        served.send(Abort("a"))
        events = []
        for frame in served.steps():
            events += frame.events
            if any(isinstance(e, RequestAborted) for e in events):
                break
        (failed,) = [e for e in events if isinstance(e, RequestFailed)]
        assert (failed.request_id, failed.code) == ("long", "context_length_exceeded")


def test_a_server_that_does_not_read_pauses_the_schedule():
    with Served(buffer_bytes=4096) as served:
        r = request("a", [1], 300)
        served.send(Submit(r))
        seen = -1
        while seen != served.executor.num_steps:  # until it stands still
            seen = served.executor.num_steps
            time.sleep(0.1)
        assert 0 < served.executor.num_steps < 300
        tokens = []
        for frame in served.steps():
            tokens += [e.token_id for e in frame.events if isinstance(e, TokenEvent)]
            if len(tokens) == 300:
                break
        assert tokens == oracle(r)[0]


def test_a_server_that_is_silent_gets_no_further_steps():
    ours, theirs = socket.socketpair()
    clock = VirtualClock(1)
    end = ServerEnd(theirs, clock)
    writer = FrameWriter(1)
    ours.sendall(writer.frame(Hello(LINK_VERSION)))
    assert end.greet() and end.receive(wait=False) == []
    clock.advance_ns(SILENCE_NS + 1)
    received = []
    thread = threading.Thread(target=lambda: received.append(end.receive(wait=False)))
    thread.start()
    thread.join(0.05)
    assert received == [], "a step would have begun"
    ours.sendall(writer.frame(Beat()))
    thread.join()
    assert received == [[]]
    end.close()
    ours.close()


def test_a_grammar_is_made_while_streams_go_on_and_others_are_refused():
    may_build = threading.Event()

    def build():
        assert may_build.wait(60)
        return source()

    with Served(grammars=Grammars(build, makes_beside=True, fills_beside=True)) as served:
        served.send(Submit(held("held", "choice")))
        served.send(Submit(request("free", [1, 2], 9)))
        served.send(Submit(held("gone", "choice")))
        served.send(Abort("gone"))
        tokens: dict[str, list[int]] = {"free": [], "held": []}
        ended = []
        for frame in served.steps():
            for event in frame.events:
                if isinstance(event, TokenEvent):
                    tokens[event.request_id].append(event.token_id)
                    ended += [event.request_id] if event.finish_reason is not None else []
                else:
                    assert isinstance(event, RequestAborted) and event.request_id == "gone"
            if "free" in ended:
                may_build.set()
            if "held" in ended:
                break
        assert ended == ["free", "held"] and tokens["free"] == oracle(request("free", [1, 2], 9))[0]
        assert tokens["held"]


def test_an_engine_at_rest_makes_ready_for_grammars(monkeypatch):
    monkeypatch.setattr(link, "REST_S", 0.01)
    built = threading.Event()

    def build():
        built.set()
        return source()

    with Served(grammars=Grammars(build, makes_beside=True)) as served:
        assert built.wait(60)
        served.send(Submit(request("a", [1], 2)))
        frame = next(frame for frame in served.steps() if not frame.next_ids and frame.events)
        assert frame.status.num_running == 0
