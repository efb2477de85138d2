"""Float constants of LLVM text in the bit-exact spelling that every LLVM reads.

torch-mlir carries a newer LLVM than llvmlite: it prints `f0x3F3504F3`, `+inf`, `+qnan` and the shortest decimals, which
the older one cannot read or finds inexact.

>>> portable("%1 = fadd float %0, 1.000000e-01")
'%1 = fadd float %0, 0x3FB99999A0000000'
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import torch

_TOKEN = re.compile(
    r"\b(?P<type>half|bfloat|float|double)\b"
    r"|(?<![\w%@.!\"])(?P<number>f0x[0-9A-F]+|[-+]?\d+\.\d+e[-+]\d+|[-+]inf|[-+]?[qs]?nan(?:\(0x[0-9a-fA-F]+\))?)(?![\w.])"
)
_NAN = re.compile(r"([-+]?)([qs]?)nan(?:\(0x([0-9a-fA-F]+)\))?")


def portable(text: str) -> str:
    """`text` with every float constant written as bits. The type of a constant is the last one named before it."""
    return "\n".join(_line(line) for line in text.split("\n"))


def _line(line: str) -> str:
    if not any(mark in line for mark in ("e+", "e-", "f0x", "inf", "nan")):
        return line
    kind = "float"

    def write(match: re.Match[str]) -> str:
        nonlocal kind
        if match["type"]:
            kind = match["type"]
            return match["type"]
        return _spell(_bits(match["number"], kind), kind)

    return _TOKEN.sub(write, line)


_MANTISSA = {"half": (16, 10), "bfloat": (16, 7), "float": (32, 23), "double": (64, 52)}
_ROUND: dict[str, Callable[[float], int]] = {
    "double": lambda x: int(struct.unpack("<Q", struct.pack("<d", x))[0]),
    "float": lambda x: int(torch.tensor(x, dtype=torch.float32).view(torch.int32)) & 0xFFFFFFFF,
    "half": lambda x: int(torch.tensor(x, dtype=torch.float16).view(torch.int16)) & 0xFFFF,
    "bfloat": lambda x: int(torch.tensor(x, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF,
}


def _bits(number: str, kind: str) -> int:
    if number.startswith("f0x"):
        return int(number[3:], 16)
    if match := _NAN.fullmatch(number):
        sign, signalling, payload = match[1] == "-", match[2] == "s", int(match[3] or "0", 16)
        width, mantissa = _MANTISSA[kind]
        exponent = ((1 << (width - 1 - mantissa)) - 1) << mantissa
        return (sign << (width - 1)) | exponent | ((not signalling) << (mantissa - 1)) | payload
    return _ROUND[kind](float(number))


def _spell(bits: int, kind: str) -> str:
    """LLVM writes half as 0xH, bfloat as 0xR, and a float as the double of the same value."""
    if kind == "half":
        return f"0xH{bits:04X}"
    if kind == "bfloat":
        return f"0xR{bits:04X}"
    if kind == "double":
        return f"0x{bits:016X}"
    sign, exponent, mantissa = bits >> 31, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if exponent == 0xFF:
        return f"0x{(sign << 63) | (0x7FF << 52) | (mantissa << 29):016X}"
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
