"""A stand-in for the GPU's driver: kernels that are launched are compiled for sm_90 and kept, and nothing runs.

Needs no GPU. Made active before the first launch, it lets the very functions that serve fill Triton's cache from many processes,
and shows what ptxas made of them. TRITON_INTERPRET must not be set.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import triton
from triton.backends.compiler import GPUTarget

MAX_SHARED_BYTES = 232448  # of a block on sm_90


class Compiled(msgspec.Struct):
    name: str
    shared_bytes: int
    cubin: bytes


class CompileOnly:
    """Triton's driver as far as a launch asks it."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)

    def activate(self) -> "CompileOnly":
        triton.runtime.driver.set_active(self)
        return self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None

    def _properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED_BYTES}

    def _load(self, name, cubin, shared_bytes, device):
        self.compiled.append(Compiled(name, shared_bytes, cubin))
        return None, None, 0, 0, 1024  # module, function, registers, spills, most threads


class Machine(msgspec.Struct):
    """What a kernel's machine code shows."""

    registers: int
    stack_bytes: int  # spills lie there
    instructions: dict[str, int]
    num_overwritten: int  # writes to registers that a product in flight still reads

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.instructions.items() if re.fullmatch(pattern, name))


def disassemble(cubin: bytes) -> Machine:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage, code = (
            subprocess.run([tools / "cuobjdump", option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    places = [
        (int(place, 16), text)
        for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?) *;", code)
    ]
    found = Counter(text.split()[0] for _, text in places)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    overwritten = sum(num_overwritten(body) for body in loops(places))
    return Machine(registers, stack, dict(found), overwritten)


def loops(places: list[tuple[int, str]]) -> Iterator[list[str]]:
    """What lies between a branch back and where it goes."""
    for place, text in places:
        target = re.search(r"^BRA\b.*\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < place:
            yield [text for other, text in places if int(target[1], 16) <= other <= place]


def num_overwritten(body: list[str]) -> int:
    """Writes of a loop, gone through twice, to registers with a matrix of a wgmma that nothing waited for yet.

    The assembler owes it that there are none, and ptxas 12.8 gets it wrong where products stay in flight.
    """
    flying: list[set[int]] = []  # registers of each group of products, the oldest first
    group: set[int] = set()
    found = 0
    for text in body * 2:
        if product := re.match(r"HGMMA\S* R\d+, (?:R(\d+), )?", text):
            if product[1]:
                group |= set(range(int(product[1]), int(product[1]) + 4))
            if "gsb0" in text:  # ends the group
                flying.append(group)
                group = set()
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", text):
            flying = flying[max(0, len(flying) - int(wait[1])) :]
        elif write := re.match(r"(\S+) R(\d+)\b", text):
            num = 4 if ".128" in write[1] else 2 if re.search(r"\.64|WIDE|^CS2R$", write[1]) else 1
            written = set(range(int(write[2]), int(write[2]) + num))
            found += any(written & registers for registers in [*flying, group])
    return found
