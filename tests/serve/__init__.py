"""Tests of the server: a stub engine behind the real door, over ASGI and over sockets."""
