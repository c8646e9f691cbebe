"""What all tests share: each leaves the log as it found it."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A test may start a server, or set up logging as one does; those after it read the log by pytest's own handler."""
    root = logging.getLogger("jilju")
    handlers, propagate, level = list(root.handlers), root.propagate, root.level
    yield
    root.handlers[:], root.propagate = handlers, propagate
    root.setLevel(level)
