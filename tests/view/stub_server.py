"""A server for tests of the pages: the real static files under the server's policy, and answers that a test scripts.

Owns an HTTP server on a thread, which stays while stubs come and go, and a stub's record of what the page sent. Scripts go on when
the test lets them (gates), so no test waits for a clock. Speaks the stream of /v1/chat/completions and knows nothing of models.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jilju import view
from jilju.serve.view_files import POLICY, load_view

START_ID, END_ID, FIRST_ID = 1, 2, 100
PAGES = {"/": "chat/index.html", "/engine": "engine/index.html", "/runs": "run/index.html"}
GATE_S = 20.0  # a gate that nobody opens is a broken test, which must end too

MODEL = {
    "id": "stub-1b",
    "object": "model",
    "max_model_len": 4096,
    "jilju": {
        "defaults": {
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "min_p": 0.0,
            "repetition_penalty": 1.1,
            "source": "the model table",
        }
    },
}

USAGE = {
    "prompt_tokens": 214,
    "completion_tokens": 11,
    "total_tokens": 225,
    "prompt_tokens_details": {"cached_tokens": 192, "cache_write_tokens": 22, "truncated_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}

TIMINGS = {
    "total_ms": 412.3,
    "parse_ms": 0.4,
    "render_ms": 0.6,
    "tokenize_ms": 1.1,
    "grammar_ms": 0.0,
    "queue_ms": 12.0,
    "prefill_ms": 82.0,
    "stalled_ms": 4.0,
    "decode_ms": 310.0,
    "resume_ms": 0.0,
    "write_ms": 0.9,
    "client_ms": 0.1,
    "other_ms": 1.2,
    "ttft_ms": 96.4,
    "tpot_ms": 31.0,
    "seed": 7,
    "steps": 11,
    "preemptions": 0,
    "resumes": 0,
}


@dataclass
class Exchange:
    """One call of /v1/chat/completions, as a script sees it."""

    handler: BaseHTTPRequestHandler
    body: dict[str, Any]
    gates: dict[str, threading.Event]
    vocabulary: "Vocabulary"
    base: dict[str, Any] = field(
        default_factory=lambda: {
            "id": "chatcmpl-stub",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "stub-1b",
        }
    )

    def refuse(self, status: int, code: str, message: str, param: str | None = None, **headers: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("content-type", "application/json")
        self.handler.end_headers()
        self.handler.wfile.write(json.dumps({"error": error}).encode())

    def begin(self) -> None:
        self.handler.send_response(200)
        self.handler.send_header("content-type", "text/event-stream")
        self.handler.send_header("x-request-id", "chatcmpl-stub")
        self.handler.end_headers()
        self._choice({"role": "assistant", "content": ""}, ())

    def token(self, text: str, *ids: int) -> None:
        """A chunk of text and the tokens that made it; without ids it is one token of this text, by an id of its own."""
        self._choice({"content": text}, ids or (self.vocabulary.id_of(text),))

    def end(
        self, reason: str = "stop", usage: dict[str, Any] | None = None, timings: dict[str, Any] | None = None
    ) -> None:
        self._choice({}, (END_ID,), finish_reason=reason)
        last = {**self.base, "choices": [], "usage": usage or USAGE, "timings": timings or TIMINGS}
        self._event(json.dumps(last))
        self.done()

    def done(self) -> None:
        self._event("[DONE]")

    def fail(self, code: str, message: str) -> None:
        self._event(json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": code}}))

    def wait(self, gate: str) -> None:
        assert self.gates[gate].wait(GATE_S), f"no test opened the gate {gate!r} within {GATE_S} s"

    def _choice(self, delta: dict[str, Any], ids: Sequence[int], finish_reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
        if self.body.get("return_token_ids"):
            choice["token_ids"] = list(ids)
        self._event(json.dumps({**self.base, "choices": [choice], "usage": None}))

    def _event(self, data: str) -> None:
        self.handler.wfile.write(f"data: {data}\n\n".encode())
        self.handler.wfile.flush()


class Vocabulary(dict[int, str]):
    """The text of each id, as /detokenize says it."""

    def id_of(self, text: str) -> int:
        token_id = next((token_id for token_id, known in self.items() if known == text), FIRST_ID + len(self))
        self[token_id] = text
        return token_id


class Gates(dict[str, threading.Event]):
    def __missing__(self, name: str) -> threading.Event:
        return self.setdefault(name, threading.Event())


def say(*tokens: str) -> Callable[[Exchange], None]:
    """A script that says these tokens and ends well."""

    def script(exchange: Exchange) -> None:
        exchange.begin()
        for token in tokens:
            exchange.token(token)
        exchange.end()

    return script


class Front:
    """The address of all stubs of a session, one after the other; a browser keeps the pages' files as long as it stays the same."""

    def __init__(self) -> None:
        self.stub: StubServer | None = None
        files = load_view(view.DIRECTORY)
        front = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path in PAGES or path.startswith(("/runs/", "/view/")):
                    self._file(
                        PAGES.get(path)
                        or (path.removeprefix("/view/") if path.startswith("/view/") else PAGES["/runs"])
                    )
                elif front.stub is not None:  # else a page that goes: its test is over
                    front.stub._get(self)

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.end_headers()

            def do_POST(self) -> None:
                if front.stub is not None:
                    front.stub._post(self)

            def _file(self, name: str) -> None:
                file = files.get(name)
                if file is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("content-type", file.content_type)
                self.send_header("content-security-policy", POLICY)
                self.send_header("x-content-type-options", "nosniff")
                self.send_header("cache-control", "max-age=3600")
                self.end_headers()
                self.wfile.write(file.data)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet: a test reads what it needs from the stub."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class StubServer:
    """`script` answers the chat calls, `gets` and `posts` the plain calls; `key`, when set, is asked of every call but the pages' own files."""

    def __init__(self, front: Front) -> None:
        self.script: Callable[[Exchange], None] = say("Hello", " there", ".")
        self.key: str | None = None
        self.health = {"status": "ok", "running": 1, "waiting": 0}
        self.models: Callable[[], dict[str, Any]] = lambda: {"object": "list", "data": [MODEL]}
        self.gets: dict[str, Callable[[], Any]] = {
            "/v1/models": lambda: self.models(),
            "/health": lambda: self.health,
        }
        self.posts: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/detokenize": self._detokenized,
            "/v1/chat/completions/render": self._rendered,
        }
        self.vocabulary = Vocabulary({START_ID: "<|im_start|>", END_ID: "<|im_end|>"})
        self.bodies: list[dict[str, Any]] = []
        self.gates: Gates = Gates()
        self.client_left = threading.Event()
        self._front = front
        self.url = front.url
        front.stub = self

    def close(self) -> None:
        self._front.stub = None

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        if (answer := self.gets.get(handler.path.partition("?")[0])) is None:
            handler.send_error(404)
        elif self._allowed(handler):
            self._json(handler, answer())

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        if handler.path != "/v1/chat/completions" and handler.path not in self.posts:
            handler.send_error(404)
            return
        if not self._allowed(handler):
            return
        if handler.path in self.posts:
            self._json(handler, self.posts[handler.path](body))
            return
        self.bodies.append(body)
        try:
            self.script(Exchange(handler, body, self.gates, self.vocabulary))
        except (BrokenPipeError, ConnectionResetError):
            self.client_left.set()

    def _detokenized(self, body: dict[str, Any]) -> dict[str, Any]:
        texts = [self.vocabulary[token_id] for token_id in body["tokens"]]
        return {"prompt": "".join(texts), "token_strs": texts, "special_ids": [START_ID, END_ID]}

    def _rendered(self, body: dict[str, Any]) -> dict[str, Any]:
        """A template of the usual kind; a word is a token."""
        text, ids, offsets, messages = "", [], [], []

        def write(*pieces: str) -> tuple[int, int]:
            nonlocal text
            begin = len(text)
            for piece in pieces:
                ids.append(self.vocabulary.id_of(piece))
                offsets.append((len(text), len(text) + len(piece)))
                text += piece
            return begin, len(text)

        for message in body["messages"]:
            write("<|im_start|>", message["role"], "\n")
            span = write(*re.findall(r"\s*\S+|\s+$", message["content"]))
            messages.append({"role": message["role"], "content_span": span})
            write("<|im_end|>", "\n")
        write("<|im_start|>", "assistant", "\n")
        found = {"prompt_text": text, "token_ids": ids, "count": len(ids), "messages": messages}
        return found | ({"token_offsets": offsets} if body.get("return_token_offsets") else {})

    def _allowed(self, handler: BaseHTTPRequestHandler) -> bool:
        if self.key is None or handler.headers["authorization"] == f"Bearer {self.key}":
            return True
        Exchange(handler, {}, self.gates, self.vocabulary).refuse(
            401, "invalid_api_key", "no key or a wrong one; send Authorization: Bearer KEY", www_authenticate="Bearer"
        )
        return False

    def _json(self, handler: BaseHTTPRequestHandler, value: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.end_headers()
        handler.wfile.write(json.dumps(value).encode())
