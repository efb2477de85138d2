"""Runs the few PTX instructions that decoding uses, on arrays of 32-bit registers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

U32 = np.uint32


def run(lines: Sequence[str], outputs: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The output registers $0 .. of PTX whose inputs are $outputs ..., arrays of u32 or u64 of one length."""
    registers: dict[str, np.ndarray] = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    size = len(inputs[0])

    def read(text: str) -> np.ndarray:
        if text in registers:
            return registers[text]
        return np.full(size, int(text, 0), U32)

    for line in lines:
        if line in ("{", "}") or line.startswith(".reg"):
            continue
        operation, _, rest = line.rstrip(";").partition(" ")
        if operation == "mov.b64":
            match = re.fullmatch(r"\{(\w+), (\w+)\}, (\$\d+)", rest)
            assert match is not None
            wide = registers[match[3]]
            registers[match[1]], registers[match[2]] = (
                (wide & 0xFFFFFFFF).astype(U32),
                (wide >> np.uint64(32)).astype(U32),
            )
            continue
        to, *operands = rest.split(", ")
        registers[to] = _result(operation, [read(text) for text in operands])
    return [registers[f"${i}"] for i in range(outputs)]


def _result(operation: str, args: list[np.ndarray]) -> np.ndarray:
    match operation:
        case "mov.b32":
            return args[0]
        case "and.b32":
            return args[0] & args[1]
        case "or.b32":
            return args[0] | args[1]
        case "xor.b32":
            return args[0] ^ args[1]
        case "sub.s32":
            return args[0] - args[1]
        case "shr.b32":
            return args[0] >> args[1]
        case "shl.b32":
            return args[0] << args[1]
        case "lop3.b32":
            return _lop3(*args)
        case "prmt.b32":
            return _prmt(*args)
        case "fma.rn.bf16x2" | "fma.rn.f16x2":
            return _fma(operation.split(".")[2][:-2], *args)
    raise AssertionError(f"an instruction that is not known: {operation}")


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for row in range(8):
        term = np.full_like(a, 0xFFFFFFFF)
        for bit, word in ((4, a), (2, b), (1, c)):
            term &= word if row & bit else ~word
        out |= np.where((table >> U32(row)) & 1, term, U32(0))
    return out


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        assert not (nibble & 8).any(), "a selector that copies signs"
        out |= ((both >> (nibble.astype(np.uint64) * 8)) & np.uint64(0xFF)).astype(U32) << U32(8 * i)
    return out


def _fma(dtype: str, *args: np.ndarray) -> np.ndarray:
    a, b, c = (numbers(arg, dtype).double() for arg in args)
    # Exact in f64: products of 11-bit numbers, and sums that are far from its 53 bits in what decoding computes.
    return words((a * b + c).to(torch.float32), dtype)


def numbers(registers: np.ndarray, dtype: str) -> torch.Tensor:
    """The two numbers of each register, f32 [..., 2]."""
    halves = torch.from_numpy(registers.astype(U32).view(np.int16).reshape(-1, 2).copy())
    return halves.view(torch.bfloat16 if dtype == "bf16" else torch.float16).float()


def words(values: torch.Tensor, dtype: str) -> np.ndarray:
    """Registers that hold two numbers each, rounded to `dtype`."""
    halves = values.to(torch.bfloat16 if dtype == "bf16" else torch.float16).contiguous()
    return halves.view(torch.int16).numpy().view(U32).reshape(-1)
