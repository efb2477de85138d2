"""Four bytes at a time: PTX that makes four codes of a 32-bit register of them, where Triton would move each by itself."""

from __future__ import annotations


def packed(ptx: str, constraints: str, codes: str, dtype: str) -> str:
    """The Triton text that runs PTX on four elements of the u8 tensor `codes` at a time, which gives four of `dtype`."""
    return f'tl.inline_asm_elementwise("{ptx}", "{constraints}", [{codes}], dtype={dtype}, is_pure=True, pack=4)'


def unpack(bits: int, plane: int, zero: int) -> str:
    """PTX: $0 holds the i8 numbers (code - zero) of the codes at bits [plane * bits, plane * bits + bits) of each byte of $1.

    With the highest bit of each byte set first, no byte borrows from the next one.
    """
    mask = ((1 << bits) - 1) * 0x01010101
    lines = ["{ .reg .b32 t;", f"shr.b32 t, $1, {plane * bits};", f"and.b32 t, t, {mask:#010x};"]
    if zero:
        lines += [
            "or.b32 t, t, 0x80808080;",
            f"sub.s32 t, t, {zero * 0x01010101:#010x};",
            "xor.b32 $0, t, 0x80808080; }",
        ]
    else:
        lines.append("mov.b32 $0, t; }")
    return " ".join(lines)


def halves(code: str) -> str:
    """PTX: $0 and $1 hold as f16, two each, the floats whose bits the bytes of $2 are: e5m2 as they are, e4m3 worth 2^-8."""
    if code == "f8e5m2":
        return "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;"
    lines = ["{ .reg .b32 s, t;"]
    for out, places in (("$0", "0x1404"), ("$1", "0x3424")):
        lines += [f"prmt.b32 s, $2, 0, {places};", "shr.b32 t, s, 1;", "and.b32 t, t, 0x3f803f80;"]
        lines += ["and.b32 s, s, 0x80008000;", f"or.b32 {out}, s, t;"]
    return " ".join([*lines, "}"])
