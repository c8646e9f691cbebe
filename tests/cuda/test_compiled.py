"""What the compiler makes of the linears' kernels for an H100 or H200: no spills, wgmma, 16 bytes a load. Needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def test_the_linears_of_a_decode_step_compile_well(device):
    if device == "cuda":
        pytest.skip("what the compiler makes is looked at where no GPU runs it")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.gpu.check_linear", "--tokens", "1"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert " kernels, 0 with faults" in done.stdout and not done.stdout.startswith("0 ")
