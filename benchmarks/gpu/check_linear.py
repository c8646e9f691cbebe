"""What sm_90's compiler makes of the linears' kernels, without a GPU: python -m benchmarks.gpu.check_linear [--gpu NAME] [--tokens 1 64]

Takes the configuration of each matrix of Llama 3.1 8B in each mode, with and without programmatic launches. Fails where a kernel
spills, has more shared memory than an SM, multiplies tiles other than by wgmma, overwrites what a product in flight still reads,
or reads weights less than 16 bytes at a time.
"""

import argparse

from benchmarks.gpu.compile_only import MAX_SHARED_BYTES, CompileOnly, Machine, disassemble
from benchmarks.gpu.tune_linear import LLAMA_8B, Case, Run, compile_case, shown

from jilju.backends.cuda.tuning import LinearConfig, load_tuning

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048)
HARMLESS_STACK_BYTES = 16  # a pair of registers kept across the whole kernel


def faults(config: LinearConfig, machine: Machine, shared_bytes: int) -> list[str]:
    found = []
    if machine.stack_bytes > HARMLESS_STACK_BYTES:
        found.append(f"{machine.stack_bytes} bytes of stack")
    if shared_bytes > MAX_SHARED_BYTES:
        found.append(f"{shared_bytes} bytes of shared memory")
    if config.kind == "tiles" and not machine.count("HGMMA.*"):
        found.append("no wgmma")
    if machine.num_overwritten:
        found.append(f"{machine.num_overwritten} writes to what a product in flight reads")
    # Through shared memory, unpacked there, fp8 weights come 8 bytes at a time
    if not machine.count(r"LDG\.E\.EF\.128|LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128(\.\w+)?|UTMALDG.*"):
        found.append("no loads of 16 bytes")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="NVIDIA H200")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    driver, tuning = CompileOnly().activate(), load_tuning(arguments.gpu)
    seen, num_faults = set(), 0
    for dtype in ("bf16", "fp8"):
        for num_tokens in arguments.tokens:
            for mode in ("fast", "invariant"):
                for matrix in LLAMA_8B:
                    case = Case(dtype, matrix, num_tokens)
                    config = tuning.linear(mode, dtype, matrix.num_rows, matrix.num_columns, num_tokens, matrix.glu)
                    for pdl in (False, True):
                        if config.kind == "matmul" or (key := Run.key(case, config, pdl)) in seen:
                            continue
                        seen.add(key)
                        compile_case(case, config, pdl)
                        kernel = driver.compiled[-1]
                        machine = disassemble(kernel.cubin)
                        found = faults(config, machine, kernel.shared_bytes)
                        num_faults += bool(found)
                        print(
                            f"{dtype:4} {matrix.name:7} t={num_tokens:<4} {shown(config):30} pdl={pdl:d}"
                            f" {machine.registers:3} registers {kernel.shared_bytes >> 10:3} KiB",
                            *found or ["ok"],
                            flush=True,
                        )
    print(f"{len(seen)} kernels, {num_faults} with faults")
    raise SystemExit(num_faults > 0)


if __name__ == "__main__":
    main()
