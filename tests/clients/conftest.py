"""Clients as people have them, against a running server: `make clients` starts it and runs these tests in each environment.

Owns the address of the server. Knows nothing of jilju: these environments do not hold it.
"""

import os

import pytest

KEY = "no-secret-at-all"
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"type": "string", "enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["JILJU_URL"]


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["JILJU_MODEL"]
