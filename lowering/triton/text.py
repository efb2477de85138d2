"""What the texts of Triton kernels share: the frame of a module, names of dtypes, roundings that the interpreter gets right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qcompile.target import Target

DTYPES: dict[str, str] = {
    "f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16", "i64": "tl.int64",
    "i32": "tl.int32", "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8", "u16": "tl.uint16", "u32": "tl.uint32",
    "bool": "tl.int1", "f8e4m3": "tl.float8e4nv", "f8e5m2": "tl.float8e5",
}  # fmt: skip

# Triton's interpreter drops bits where a GPU rounds to the nearest, and multiplies the raw bits of bf16 in a dot.
_ROUND_BF16 = '''

@triton.jit
def round_bf16(x):
    """x f32, rounded to the nearest bf16 (ties to even), as f32."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
'''


def named(functions: str) -> dict[str, str]:
    """The functions of a text by name, in its order."""
    found = re.finditer(r"@triton\.jit\ndef (?P<name>\w+)\(.*?(?=\n@triton\.jit|\Z)", functions, re.DOTALL)
    return {match["name"]: match.group().strip() for match in found}


def called(functions: dict[str, str], body: str) -> str:
    """The texts of all of `functions` that `body` calls, and of those that they call: each calls only those before it."""
    wanted: list[str] = []
    for name in reversed(functions):
        if re.search(rf"(?<![\w.]){name}\(", "\n".join([body, *wanted])):
            wanted.insert(0, functions[name])
    return "\n\n\n".join(wanted)


def module(
    entry: str, about: str, arguments: Sequence[str], dims: int, body: str, target: Target, helpers: str = ""
) -> str:
    """The text of a module with one kernel, `entry(*arguments, d0, d1 ...)`, whose lines are `body` (not indented).

    `about` is its docstring: the formula and the schedule. `helpers` are functions that the body calls, already whole.
    """
    names = ", ".join([*arguments, *(f"d{i}" for i in range(dims))])
    lines = "\n".join(f"    {line}".rstrip() for line in body.strip("\n").splitlines())
    shared = (_ROUND_BF16 if interpreted(target) else "") + (f"\n\n{helpers.strip()}\n" if helpers else "")
    return (
        f'"""{as_docstring(about)}\n"""\n\nimport triton\nimport triton.language as tl\n{shared}\n\n'
        f"@triton.jit\ndef {entry}({names}):\n{lines}\n"
    )


def as_docstring(about: str) -> str:
    """A text, which may be from an artifact, with nothing in it that ends a docstring."""
    return about.strip().replace("\\", "/").replace('"', "'")


def interpreted(target: Target) -> bool:
    """Whether the text is for Triton's interpreter, which gets some roundings and products wrong."""
    return target.capability == 0


def cast(expression: str, dtype: str, target: Target) -> str:
    """The f32 `expression` in `dtype`, floats rounded to the nearest: what is to be stored."""
    if dtype == "f32":
        return expression
    if dtype == "bf16" and interpreted(target):
        expression = f"round_bf16({expression})"
    return f"({expression}).to({DTYPES[dtype]})"


def dot_operand(expression: str, params: dict[str, Any], target: Target) -> str:
    """The f32 `expression` as an operand of `tl.dot`: rounded to params["compute"], "bf16" or "f16"."""
    rounded = cast(expression, params["compute"], target)
    return f"({rounded}).to(tl.float32)" if interpreted(target) else rounded


def multiple_of(number: str, multiple: int) -> str:
    """The text of a number of the call that `multiple` divides, such that Triton sees it: hints on arguments are lost."""
    return f"{number} // {multiple} * {multiple}" if multiple > 1 else number


def dispatch(bodies: Sequence[Sequence[str]], tiles: Sequence[int], names: Sequence[str]) -> tuple[list[str], str]:
    """The lines of a kernel whose programs' first axis walks the tiles of several sections, and the functions that they call.

    A body's lines know `tile`, the number within its section, and the pointers and numbers `names`.
    """
    lines, functions, first = ["tile = tl.program_id(0)"], "", 0
    if len(bodies) == 1:
        return [*lines, *bodies[0]], functions
    given = ", ".join(names)
    for part, (body, count) in enumerate(zip(bodies, tiles, strict=True)):
        made = "\n".join(f"    {line}" for line in body)
        functions += f"\n\n\n@triton.jit\ndef part{part}(tile, {given}):\n{made}"
        lines += [f"if (tile >= {first}) & (tile < {first + count}):", f"    part{part}(tile - {first}, {given})"]
        first += count
    return lines, functions
