"""The program of a worker process: `python -m jilju.assemble.worker_process OPTIONS FD`.

OPTIONS is WorkerOptions as JSON, FD the file descriptor of the link, appended by who starts it. Compiles grammars and renders chat
templates until the link ends; loads for each kind of job what it needs when the first one comes.
"""

import os
import socket
import sys
from collections.abc import Callable

import msgspec

from jilju.engine.link import belong_to_the_server
from jilju.errors import StartupError, TemplateFailed
from jilju.serve.worker_link import Compile, Job, Render, serve_jobs
from jilju.text.grammar import to_llguidance
from jilju.text.template import ChatTemplate
from jilju.text.text_files import open_text_files

NICENESS = 5  # a quarter of a core beside an engine that is busy on it: a grammar may wait, streams do not


class WorkerOptions(msgspec.Struct, frozen=True):
    """Everything that a worker needs to start, as plain data."""

    path: str  # of the model file or folder
    vocab_size: int  # ids of the masks, as in the engine
    memory_bytes: int = 256 << 20  # what one job may add to the process
    stands_in: bool = False  # a folder may be without a tokenizer


def worker_command(options: WorkerOptions) -> tuple[str, ...]:
    return (sys.executable, "-m", "jilju.assemble.worker_process", msgspec.json.encode(options).decode())


class ModelJobs:
    """Jobs of one model."""

    def __init__(self, options: WorkerOptions):
        self._options = options
        self._files = open_text_files(options.path, options.vocab_size, stands_in=options.stands_in)
        self._table = self._files.token_table()
        self._try_out: Callable[[str], None] | None = None
        self._template: ChatTemplate | None = None

    def prepare(self, job: Job) -> Callable[[], str]:
        if isinstance(job, Compile):
            return self._compiling(job)
        if job.template is None and self._template is None:
            self._template = self._files.template(self._table.tokens.__getitem__)
        return lambda: self._render(job)

    def _compiling(self, job: Compile) -> Callable[[], str]:
        try_out = self._try_out = self._try_out or self._load_trial()

        def compiled() -> str:
            grammar = to_llguidance(job.source)
            try_out(grammar)
            return grammar

        return compiled

    def _load_trial(self) -> Callable[[str], None]:
        # imported here, for a worker that renders only starts without it
        from jilju.text.matcher import GrammarSource as Matchers
        from jilju.text.trial import try_out

        vocab_size = self._options.vocab_size
        matchers = Matchers(self._table, vocab_size)
        return lambda grammar: try_out(grammar, matchers, vocab_size)

    def _render(self, job: Render) -> str:
        try:
            template = self._template
            if job.template is not None:
                template = self._files.template(self._table.tokens.__getitem__, job.template)
        except StartupError as error:
            raise TemplateFailed(f"chat_template is no template: {error}", param="chat_template") from None
        if template is None:
            raise TemplateFailed("the model has no chat template", param="messages")
        return template.render(job.messages, **job.options)


def main(options: str, descriptor: str) -> None:
    belong_to_the_server()
    os.nice(NICENESS)
    worker_options = msgspec.json.decode(options, type=WorkerOptions)
    jobs = ModelJobs(worker_options)
    serve_jobs(socket.socket(fileno=int(descriptor)), jobs.prepare, worker_options.memory_bytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
