"""The examples of docs/clients.md, run as they stand, each in an environment that has its client."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=[str(number) for number in range(len(EXAMPLES))])
def test_an_example_runs(code, url, model, capsys):
    modules = [node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        pytest.skip(f"{missing[0]} is not in this environment")
    exec(compile(code.replace("http://127.0.0.1:8000", url).replace("smollm2-135m", model), str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip()
