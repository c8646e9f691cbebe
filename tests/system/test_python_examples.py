"""The documents' Python examples run as they stand, but for the server's address and model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import needs_smollm2

pytestmark = needs_smollm2
ROOT = Path(__file__).parents[2]
ADDRESS, DEFAULT_MODEL = "http://127.0.0.1:8000", "qwen2.5-coder-0.5b"


def examples() -> list[tuple[str, str]]:
    found = []
    for name in ("README.md", "docs/python.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        found += [(name, block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    return found


EXAMPLES = examples()


def test_there_is_an_example_of_each_way():
    for way in ("from openai import OpenAI", "from jilju import LLM, SamplingParams"):
        assert any(way in code for name, code in EXAMPLES if name == "README.md"), way


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EXAMPLES)])
def test_example(name, code, smollm2_server):
    code = code.replace(ADDRESS, smollm2_server.url).replace(DEFAULT_MODEL, "smollm2-135m")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "print" not in code, "it prints something"
