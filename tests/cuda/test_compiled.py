"""What the compiler makes of the linears' kernels for an H100 or H200: no spills, wgmma whose registers are left
alone, 16 bytes a load. Needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks.gpu.compile_only import num_overwritten

ROOT = Path(__file__).parents[2]


def test_the_linears_of_a_decode_step_compile_well(device):
    if device == "cuda":
        pytest.skip("what the compiler makes is looked at where no GPU runs it")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.gpu.check_linear", "--tokens", "1", "64"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert " kernels, 0 with faults" in done.stdout and not done.stdout.startswith("0 ")


def test_a_write_to_what_a_product_in_flight_reads_is_found():
    product = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], R24, gsb0"
    load, other, wait = "LDS.64 R42, [R1]", "LDS.U16 R44, [R1]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert num_overwritten([load, other, product, wait]) == 0
    assert num_overwritten([load, other, product]) == 1  # in the second round
    assert num_overwritten([product, load, other, wait]) == 2
    assert num_overwritten([load, product, wait.replace("0x0", "0x1")]) == 1
    assert num_overwritten([load, product.replace("R40, ", "")]) == 0  # from shared memory
