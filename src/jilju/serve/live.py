"""The engine page's data: GET /v1/jilju/events, /v1/jilju/window and /v1/jilju/trace.

Owns the parameters, the open streams and their bound, and that pages which show the same share one fold a second. What is long
to fold (a call's ledger) is folded in a thread over a copy of the log, so that no stream waits for a page. Knows nothing of what
a frame says.
"""

import asyncio
import logging
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jilju.account.chrome_trace import calls_in, find_call, span_of, write_trace
from jilju.account.recording import Recording, Viewer
from jilju.account.records import CallRecord
from jilju.account.sequence_rows import SequenceRows
from jilju.account.waterfalls import Waterfalls, make_waterfall
from jilju.account.window import Cursor, ended_in, make_fold, seen_by, slowest
from jilju.errors import ConflictingParameters, InvalidValue, Overloaded, RunNotFound, UnknownParameter
from jilju.serve.body import ClientLeft
from jilju.serve.door.gate import arrival_of
from jilju.serve.errors import shown
from jilju.serve.fields import refuse
from jilju.serve.recordings import viewer_of
from jilju.serve.server import Server
from jilju.serve.stream import EVENT_STREAM

logger = logging.getLogger("jilju.serve")

MAX_STREAMS = 16
MAX_SECONDS = 3600
MAX_TRACE_SECONDS = 600
DEFAULT_SECONDS = 60
DEFAULT_TRACE_SECONDS = 30
PERIOD_S = 1.0
MAX_WAITING_FRAMES = 4  # of a reader; one that is slower begins anew


class LiveRoutes:
    def __init__(self, server: Server):
        self._server = server
        self._folds = _Folds(server)
        self._pages = _Pages(self._folds)

    async def events(self, request: Request) -> Response:
        """A frame of the last seconds, then one a second with what is new, until the server drains or the reader leaves."""
        seconds = _seconds(_query(request, "seconds"), DEFAULT_SECONDS, MAX_SECONDS)
        self._server.drain.check()
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        page = self._pages.open(viewer_of(arrival_of(request.scope).key), seconds)
        return _EventStream(self._server, self._pages, page)

    async def window(self, request: Request) -> Response:
        """The frame of a stretch of the past."""
        query = _query(request, "seconds", "end_ms")
        seconds = _seconds(query, DEFAULT_SECONDS, MAX_SECONDS)
        source = self._server.recordings.recording()
        end_ns = window_end_ns(query.get("end_ms"), source)
        viewer = viewer_of(arrival_of(request.scope).key)
        data = await self._folds.window(seconds, end_ns if "end_ms" in query else None, viewer)
        return Response(data, media_type="application/json")

    async def trace(self, request: Request) -> Response:
        """Of one run, or of the last seconds, in the trace-event format."""
        query = _query(request, "run", "seconds")
        viewer, source = viewer_of(arrival_of(request.scope).key), self._server.recordings.recording()
        run = query.get("run")
        if run is None:
            seconds = _seconds(query, DEFAULT_TRACE_SECONDS, MAX_TRACE_SECONDS)
            span = source.now_ns - seconds * 10**9, source.now_ns
        elif "seconds" in query:
            raise ConflictingParameters("run and seconds are both given; give one of them", param="seconds")
        else:
            call = find_call(source, run)
            if call is None or not viewer.sees(call.key_name):
                raise RunNotFound(f"there is no run {shown(run)}, or not any more; see /v1/jilju/runs")
            span = span_of(call, source.now_ns)
        pieces = write_trace(part_of(source, calls_in(source, *span), span), *span, run, viewer=viewer)
        headers = {"content-disposition": 'attachment; filename="jilju-trace.json"'}
        return StreamingResponse(pieces, media_type="application/json", headers=headers)


def part_of(source: Recording, calls: list[CallRecord], span: tuple[int, int]) -> Recording:
    """A copy of what of the log these calls and the span take, for a thread."""
    first_ns = min([span[0], *(call.received_ns for call in calls)])
    return replace(source, log=source.log.part(source.log.serials(first_ns, span[1])))


# ---- frames --------------------------------------------------------------------------------------------------------


class _Folds:
    """Frames as bytes, and what of them is kept for the next."""

    def __init__(self, server: Server):
        self._recordings = server.recordings
        self._bars, self._rows = Waterfalls(), SequenceRows()
        self._one_at_a_time = asyncio.Lock()

    async def window(self, seconds: int, end_ns: int | None, viewer: Viewer) -> bytes:
        """`end_ns` None: up to now."""
        async with self._one_at_a_time:
            await self._prepare(seconds, end_ns or self._recordings.now_ns())
            source = self._recordings.recording()
            end_ns = end_ns or source.now_ns
            fold = make_fold(source, end_ns - seconds * 10**9, end_ns, waterfalls=self._bars)
            return msgspec.json.encode(seen_by(fold, viewer))

    async def following(
        self, wanted: dict[tuple[int, Cursor | None], set[Viewer]]
    ) -> "dict[Shown, tuple[bytes, Cursor]]":
        """The frame up to now for each window's length, reader's place and viewer."""
        async with self._one_at_a_time:
            for seconds in {seconds for seconds, _ in wanted}:
                await self._prepare(seconds, self._recordings.now_ns())
            source = self._recordings.recording()
            found: dict[Shown, tuple[bytes, Cursor]] = {}
            for (seconds, since), viewers in wanted.items():
                begin_ns = source.now_ns - seconds * 10**9
                fold = make_fold(source, begin_ns, source.now_ns, since=since, waterfalls=self._bars, rows=self._rows)
                for viewer in viewers:
                    found[seconds, since, viewer] = msgspec.json.encode(seen_by(fold, viewer)), fold.cursor
            return found

    async def _prepare(self, seconds: int, end_ns: int) -> None:
        """The bars that the window is going to show."""
        source = self._recordings.recording()
        begin_ns = end_ns - seconds * 10**9
        missing = self._bars.missing(slowest(ended_in(source, max(begin_ns, source.first_ns), end_ns)))
        if missing:
            part = part_of(source, missing, (end_ns, end_ns))
            bars = await asyncio.to_thread(lambda: [make_waterfall(call, part) for call in missing])
            self._bars.add(zip(missing, bars, strict=True))


Shown = tuple[int, Cursor | None, Viewer]


@dataclass(slots=True, eq=False)
class _Page:
    """An open stream of frames."""

    viewer: Viewer
    seconds: int
    since: Cursor | None = None  # None: it has no frame yet
    frames: "asyncio.Queue[bytes | None]" = field(default_factory=lambda: asyncio.Queue(MAX_WAITING_FRAMES))
    is_ended: bool = False

    def put(self, data: bytes, cursor: Cursor) -> None:
        if self.frames.full():
            self.end()
            return
        self.since = cursor
        self.frames.put_nowait(data)

    def end(self) -> None:
        self.is_ended = True
        while not self.frames.empty():
            self.frames.get_nowait()
        self.frames.put_nowait(None)


class _Pages:
    """All open streams, and the one task that feeds them, which is there while there are any."""

    def __init__(self, folds: _Folds):
        self._folds = folds
        self._open: set[_Page] = set()
        self._task: asyncio.Task[None] | None = None

    def open(self, viewer: Viewer, seconds: int) -> _Page:
        if len(self._open) >= MAX_STREAMS:
            raise Overloaded(
                f"{MAX_STREAMS} pages follow the engine, which is the most; close one, or ask /v1/jilju/window",
                retry_after_s=5.0,
            )
        page = _Page(viewer, seconds)
        self._open.add(page)
        if self._task is None:
            self._task = asyncio.create_task(self._feed(), name="jilju-live-view")
        return page

    def close(self, page: _Page) -> None:
        self._open.discard(page)
        if not self._open and self._task is not None:
            self._task.cancel()
            self._task = None

    async def first(self, page: _Page) -> None:
        """It need not wait for the others' second."""
        await self._send([page])

    async def _feed(self) -> None:
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                await self._send([page for page in self._open if page.since is not None and not page.is_ended])
        except Exception:  # a defect: nobody may wait for ever
            logger.exception("the live view failed")
            for page in self._open:
                page.end()

    async def _send(self, pages: list[_Page]) -> None:
        if not pages:
            return
        wanted: dict[tuple[int, Cursor | None], set[Viewer]] = defaultdict(set)
        for page in pages:
            wanted[page.seconds, page.since].add(page.viewer)
        found = await self._folds.following(wanted)
        for page in pages:
            page.put(*found[page.seconds, page.since, page.viewer])


class _EventStream(Response):
    """One page's frames as server-sent events."""

    def __init__(self, server: Server, pages: _Pages, page: _Page):
        super().__init__()
        self._server, self._pages, self._page = server, pages, page
        self._is_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._frames(send))
        left = asyncio.create_task(_left(receive))
        drained = asyncio.create_task(self._server.drain.begun.wait())
        try:
            await asyncio.wait({work, left, drained}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._pages.close(self._page)
            for task in (work, left, drained):
                task.cancel()
            await asyncio.gather(work, left, drained, return_exceptions=True)
        if not work.cancelled():
            work.result()
        if not left.cancelled():
            raise ClientLeft
        if not self._is_begun:
            self._server.drain.check()
        await send({"type": "http.response.body", "body": b""})

    async def _frames(self, send: Send) -> None:
        await self._pages.first(self._page)
        await send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM)})
        self._is_begun = True
        while (data := await self._page.frames.get()) is not None:
            try:
                await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
            except OSError as error:
                raise ClientLeft(str(error)) from error


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ---- parameters ----------------------------------------------------------------------------------------------------


def _query(request: Request, *names: str) -> dict[str, str]:
    return checked_query(request.query_params.multi_items(), names)


def checked_query(items: list[tuple[str, str]], names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in items:
        if name not in names:
            raise UnknownParameter(
                f"{shown(name)} is no parameter of this route; allowed: {', '.join(names)}", param=name
            )
        if name in found:
            raise InvalidValue(f"{name} is given twice; give it once", param=name)
        found[name] = value
    return found


def _seconds(query: dict[str, str], default: int, most: int) -> int:
    return seconds_of(query.get("seconds"), default, most)


def seconds_of(given: str | None, default: int, most: int) -> int:
    if given is None:
        return default
    if not given.isascii() or not given.isdecimal() or not 1 <= int(given[:9]) <= most:
        raise refuse("seconds", given, f"a whole number from 1 to {most}")
    return int(given)


def window_end_ns(given: str | None, source: Recording) -> int:
    """The end of the window that was asked for; None: the end of what there is."""
    if given is None:
        return source.now_ns
    first_ms, now_ms = source.first_ns / 1e6, source.now_ns / 1e6
    try:
        end_ms = float(given)
    except ValueError:
        end_ms = math.nan
    if not first_ms <= end_ms <= now_ms:
        span = f"{first_ms:.3f} to {now_ms:.3f}"
        raise refuse(
            "end_ms",
            given,
            f"{span}, ms of the log's own clock (first_ms and end_ms of a frame); leave it out for the newest",
        )
    return min(max(round(end_ms * 1e6), source.first_ns), source.now_ns)
