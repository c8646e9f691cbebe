"""Grammars: made beside the step loop, and filled into masks while the model runs.

Owns the two threads that do so, and the source of matchers. The step loop never waits for a grammar to be made; a sample waits for
the masks of its batch. Knows nothing of how a grammar is written or read, nor of what becomes of a sequence.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np

from jilju.engine.matcher import Grammar, MatcherSource
from jilju.engine.request import Request
from jilju.engine.scheduler import Step
from jilju.plan import Batch

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class _Fill(NamedTuple):
    """A mask of a batch, and what goes into it."""

    grammar: Grammar
    mask: np.ndarray
    allowed: np.ndarray | None
    banned_ids: np.ndarray


class Grammars:
    """`build` makes the source, at the first use or when `prepare` asks for it: that may take a second.

    `makes_beside` and `fills_beside` say what a thread does beside the caller's. Without them all is done at once; tokens are the same.
    """

    def __init__(self, build: Callable[[], MatcherSource], *, makes_beside: bool = False, fills_beside: bool = False):
        self._build: Callable[[], MatcherSource] | None = build  # None: done, it may hold much
        self._source: MatcherSource | None = None
        self._maker: Executor = ThreadPoolExecutor(1, "jilju-grammars") if makes_beside else _Caller()
        self._filler: Executor = ThreadPoolExecutor(1, "jilju-masks") if fills_beside else _Caller()
        self._filling: Future[None] | None = None
        self._fence = threading.Lock()
        self.is_prepared = False  # or being so

    def prepare(self) -> None:
        """Have the source built while nobody waits for it."""
        self.is_prepared = True
        self._maker.submit(self._get_source).add_done_callback(_log_failure)

    def make(self, request: Request) -> Future[Grammar]:
        """The request's grammar, with the tokens taken that an earlier engine made."""
        self.is_prepared = True
        return self._maker.submit(self._make, request)

    def _make(self, request: Request) -> Grammar:
        return Grammar(self._get_source().make(request.grammar), request)

    def _get_source(self) -> MatcherSource:
        if self._source is None:
            assert self._build is not None, "built once"
            self._source, self._build = self._build(), None
        return self._source

    def begin(self, step: Step, batch: Batch) -> None:
        """Have the batch's masks filled, of which the backend is told when they are."""
        if not batch.masks_ready[0]:
            self._filling = self._filler.submit(self._fill, list(_fills(step, batch)), batch.masks_ready)

    def end(self) -> None:
        """However the step went, nobody is in a matcher any more."""
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.result()

    def _fill(self, fills: list[_Fill], ready: np.ndarray) -> None:
        try:
            for fill in fills:
                fill.grammar.fill(fill.mask, fill.allowed, fill.banned_ids)
        finally:
            with self._fence:  # who sees the flag, which is no lock of Python's, sees the masks
                ready[0] = 1

    def close(self) -> None:
        for executor in (self._maker, self._filler):
            executor.shutdown(wait=True, cancel_futures=True)
        if self._source is not None:
            self._source.close()


class _Caller(Executor):
    """Does at once what it is asked."""

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _fills(step: Step, batch: Batch) -> Iterator[_Fill]:
    logit = -1  # of each row the last, which is the one that is sampled from
    for row in step.rows:
        logit += row.num_logits
        grammar = row.sequence.grammar
        if row.is_sampled and grammar is not None:
            banned_ids = batch.banned_ids[batch.banned_starts[logit] : batch.banned_starts[logit + 1]]
            yield _Fill(grammar, batch.masks[batch.mask_rows[logit]], row.sequence.mask, banned_ids)


def _log_failure(future: Future[MatcherSource]) -> None:
    if not future.cancelled() and future.exception() is not None:
        logger.error("grammars cannot be had: %s", future.exception())
