"""Elements of any dtype in memory as Triton values, as text: loads, stores, and conversions between dtypes.

As on the CPU, every float is an f32 that holds a value of the narrow type, bool is i1, integers keep their width.
"""

from __future__ import annotations

from qcompile.expr import FLOATS
from qcompile.lowering.triton.text import DTYPES, interpreted
from qcompile.target import Target

_BYTES = ("bool", "f8e4m3", "f8e5m2", "f8e8m0")


def pointer(dtype: str) -> str:
    """The dtype that a kernel's pointer to elements of `dtype` has: 8-bit floats and bools are read as bytes."""
    return "u8" if dtype in _BYTES else dtype


def value_type(dtype: str) -> str:
    """The Triton type of the value of an element of `dtype`."""
    return "tl.float32" if dtype in FLOATS else DTYPES[dtype]


def load(address: str, dtype: str, mask: str = "") -> str:
    """The value at an address; 0 where the mask does not hold."""
    raw = f"tl.load({address}, mask={mask}, other=0)" if mask else f"tl.load({address})"
    if dtype in ("f16", "bf16"):
        return f"{raw}.to(tl.float32)"
    if dtype == "bool":
        return f"{raw} != 0"
    return f"{dtype}_to_f32({raw})" if dtype.startswith("f8") else raw


def store(address: str, value: str, dtype: str, target: Target, mask: str = "") -> str:
    """The statement that writes a value, floats rounded to the nearest."""
    return f"tl.store({address}, {_narrow(value, dtype, target)}{f', mask={mask}' if mask else ''})"


def _narrow(value: str, dtype: str, target: Target) -> str:
    if dtype == "bf16" and interpreted(target):
        return f"round_bf16({value}).to(tl.bfloat16)"
    if dtype in ("f16", "bf16", "bool"):
        return f"{value}.to({DTYPES[pointer(dtype)]})"
    return f"f32_to_{dtype}({value})" if dtype.startswith("f8") else value


def convert(value: str, source: str, dtype: str, target: Target) -> str:
    """The value of dtype `source`, a name, as one of `dtype`, as torch's `to` does (floats to integers toward zero)."""
    if source == dtype:
        return value
    if dtype == "bool":
        return f"{value} != 0"
    if dtype in FLOATS:
        if source not in FLOATS:
            value = f"{value}.to(tl.float32)"
        return _rounded(value, dtype, target)
    if source in FLOATS:
        return f"to_i64({value})" if dtype == "i64" else _integer(f"to_i32({value})", dtype)
    return f"{value}.to({DTYPES[dtype]})"


def _rounded(value: str, dtype: str, target: Target) -> str:
    if dtype == "f32":
        return value
    if dtype == "bf16" and interpreted(target):
        return f"round_bf16({value})"
    narrow = _narrow(value, dtype, target)
    return f"{dtype}_to_f32({narrow})" if dtype.startswith("f8") else f"{narrow}.to(tl.float32)"


def _integer(value: str, dtype: str) -> str:
    return value if dtype == "i32" else f"{value}.to({DTYPES[dtype]})"
