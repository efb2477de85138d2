"""What a kernel's machine code does: its loops, and in them instructions, loads by width, and the work of tensor cores.

Instructions are counted as the disassembler lists them, each once: a static count, which no time follows from alone.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.errors import ToolchainError

_LINE = re.compile(r"/\*(?P<at>[0-9a-f]+)\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)(?P<rest>[^;]*);")
# 64x16x16 is m64 n16 k16, which four warps share; 16816 is m16 n8 k16, which one warp does.
_TENSOR = re.compile(r"[A-Z]*MMA\.(?:(?:SP\.)?(?:(\d+)x(\d+)x(\d+)|16(8)(\d+)))")
_WIDTH = re.compile(r"\.(?:(128|64)|[US](16|8))\b")


@dataclass(frozen=True)
class Code:
    """A stretch of machine code as a thread runs through it once."""

    operations: tuple[str, ...]

    @property
    def instructions(self) -> int:
        return len(self.operations)

    @property
    def products(self) -> float:
        """Multiplications that tensor cores do, a thread; what tcgen05 does is not written in its instructions."""
        return sum(_products(operation) for operation in self.operations)

    @property
    def tensor_cores(self) -> int:
        """Instructions for tensor cores."""
        return sum("MMA" in operation.split(".")[0] for operation in self.operations)

    @property
    def loads(self) -> Counter[int]:
        """Loads from global memory, to registers or on to shared memory, by their width in bits."""
        return Counter(_width(op) for op in self.operations if op.split(".")[0] in ("LDG", "LDGSTS"))

    @property
    def shared_loads(self) -> Counter[int]:
        """Loads from shared memory by their width in bits; those of matrices count the bits of a thread."""
        return Counter(_width(op) for op in self.operations if op.split(".")[0] == "LDS") + Counter(
            32 * int(op[-1]) for op in self.operations if op.startswith("LDSM") and op[-1].isdigit()
        )

    @property
    def spills(self) -> int:
        """Loads and stores of a thread's own memory, where registers go that there is no room for."""
        return sum(operation.split(".")[0] in ("LDL", "STL") for operation in self.operations)

    def counts(self) -> Counter[str]:
        """Instructions by name, without their modifiers."""
        return Counter(operation.split(".")[0] for operation in self.operations)


@dataclass(frozen=True)
class Profile:
    """A kernel's whole code, and the loops in it that hold no other loop."""

    code: Code
    loops: tuple[Code, ...]

    @property
    def main(self) -> Code:
        """The loop in which tensor cores do most, or else the longest one; the whole code where there is no loop."""
        return max(
            self.loops, key=lambda loop: (loop.products, loop.tensor_cores, loop.instructions), default=self.code
        )

    def per_weight(self, rows: int) -> float:
        """Instructions a weight in the main loop of a kernel whose programs compute `rows` rows of x at once."""
        return self.main.instructions / (self.main.products / rows)


def profile(cubin: bytes) -> Profile:
    """What is in a cubin with one kernel; ToolchainError when it cannot be disassembled."""
    return profiles([cubin])[0]


def profiles(cubins: Sequence[bytes]) -> list[Profile]:
    """The profile of each cubin; all are of one capability.

    The disassembler takes half a second to start, so it is started once, with the code of all kernels in a row.
    """
    if not cubins:
        return []
    codes = [_code(cubin) for cubin in cubins]
    text, first, found = disassembly(b"".join(codes), _processor(cubins[0])), 0, []
    lines = [(int(match["at"], 16), match) for match in _LINE.finditer(text)]
    for code in codes:
        found.append(_parsed((at, match) for at, match in lines if first <= at < first + len(code)))
        first += len(code)
    return found


def disassembly(code: bytes, processor: str) -> str:
    """Machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(code)
        file.flush()
        try:
            command = [str(_tool("nvdisasm")), "-ndf", "-b", processor, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise ToolchainError("machine code cannot be disassembled", found=error) from error


def _code(cubin: bytes) -> bytes:
    """The instructions of the kernel in a cubin, which is an ELF file of 64 bits."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + at * size) for at in range(count)]
    for name, _, _, _, offset, length in sections:
        start = sections[names][4] + name
        if cubin[start : start + 6] == b".text.":
            return cubin[offset : offset + length]
    raise ToolchainError("a cubin holds no kernel")


def _processor(cubin: bytes) -> str:
    """The processor that a cubin is for, as the disassembler calls it."""
    (flags,) = struct.unpack_from("<I", cubin, 0x30)
    capability = flags & 0xFF if cubin[8] < 8 else flags >> 8 & 0xFF  # by the version of the file's ABI
    return f"SM{capability}{'a' if capability >= 90 else ''}"


def _tool(name: str) -> Path:
    """A program that Triton brings along."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise ToolchainError("reading machine code needs Triton", remedy="pip install 'qcompile[cuda]'")
    return Path(found.origin).parent / "backends" / "nvidia" / "bin" / name


def parse(text: str) -> Profile:
    """The profile of a disassembled kernel.

    >>> found = parse("/*0000*/ S2R R0, SR_TID.X ; /*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ; "
    ...               "/*0020*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ; /*0030*/ @!P0 BRA 0x10 ; /*0040*/ EXIT ;")
    >>> found.code.instructions, found.main.instructions, found.main.loads, found.per_weight(rows=8)
    (5, 3, Counter({128: 1}), 0.375)
    """
    return _parsed((int(match["at"], 16), match) for match in _LINE.finditer(text))


def _parsed(lines: Iterable[tuple[int, re.Match[str]]]) -> Profile:
    operations: list[str] = []
    places: dict[int, int] = {}
    back: list[tuple[int, int]] = []
    for at, match in lines:
        places[at] = len(operations)
        operations.append(match["op"])
        aim = re.search(r"\b0x([0-9a-f]+)", match["rest"]) if match["op"].startswith("BRA") else None
        if aim is not None and int(aim[1], 16) in places:
            back.append((places[int(aim[1], 16)], len(operations)))
    return Profile(Code(tuple(operations)), tuple(_innermost(operations, back)))


def _innermost(operations: Sequence[str], loops: Sequence[tuple[int, int]]) -> Iterable[Code]:
    """The loops without the ones around others; the jump that ends every kernel, to itself, is none."""
    real = {(start, end) for start, end in loops if end - start > 1}
    for start, end in sorted(real):
        inside = (other for other in real if other != (start, end) and start <= other[0] and other[1] <= end)
        if not any(inside):
            yield Code(tuple(operations[start:end]))


def _products(operation: str) -> float:
    found = _TENSOR.match(operation)
    if found is None:
        return 0
    m, n, k, narrow, deep = (int(number or 0) for number in found.groups())
    return m * n * k / 128 if m else 16 * narrow * deep / 32


def _width(operation: str) -> int:
    found = _WIDTH.search(operation)
    return 32 if found is None else int(found[1] or found[2])
