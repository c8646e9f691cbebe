"""Where the kernels run: on a GPU if there is one, else in Triton's interpreter on the CPU.

Each test module begins with `pytest.importorskip("torch")` and `("triton")`, so that an environment without them skips it by name.
"""

import importlib.util
import os

import pytest

if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("triton") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        from tests.cuda.interpreter import mend

        mend()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
