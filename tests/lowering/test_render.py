"""Expressions as MLIR text against their evaluation: the operations and signs that formats rarely use, and refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_bench import Kernel

from qcompile.evaluate import Reader
from qcompile.expr import Expr, bitcast, bits, cast, cat, const, k, load, n, table, where
from qcompile.lowering.base import Refuse
from qcompile.lowering.mlir.memory import convert
from qcompile.lowering.mlir.text import Text
from qcompile.lowering.render import Renderer, check
from qcompile.simplify import coordinates

ROWS, COLUMNS = 5, 48
word = load("words", "i32", (ROWS, COLUMNS), n, k)
half = load("halves", "f16", (ROWS, COLUMNS), n, k)
EXPRESSIONS: dict[str, Expr] = {
    "division rounds down": word // 7 + word // -5,
    "remainder has the divisor's sign": word % 7 + word % -5,
    "a vector divides": cast("i32", const(1000)) // (k + 1) % 17,
    "bits of a shifted word": bits(word, k % 29, 3) + bits(word, 0, 32),
    "cat": cat(bits(word, 3, 2), bits(word, 9, 4), bits(word, 30, 1)),
    "where": where(word < 0, word - 1, k * n),
    "integer table": table((7, -3, 100, 5), bits(word, 4, 2)) * 3,
    "float table": table(tuple(float(i) ** 3 for i in range(40)), k % 40),
    "signed bytes": bitcast("i8", word) + bitcast("i16", word),
    "float bits": bitcast("f16", word % 31744) + cast("f16", const(1.0)),
    "8-bit float bits": cast("f32", bitcast("f8e4m3", word % 127)) + cast("f32", cast("f8e5m2", half)),
    "powers of two": cast("f32", bitcast("f8e8m0", word % 255)),
    "float division": half / cast("f16", const(3.0)) + cast("f16", cast("f32", half) / const(0.7)),
    "each operation of a half rounds": half * half + half * cast("f16", const(0.1)),
    "brain floats": cast("bf16", half) * cast("bf16", const(3.0)) - cast("bf16", const(0.7)),
    "to an integer, toward zero": cast("i32", cast("f32", half) * const(9.7)),
    "scalar": cast("f32", n * 3 - 1),
}


def rendered(expr: Expr, tensors: dict[str, torch.Tensor], lanes: int) -> torch.Tensor:
    """expr at every coordinate as f32, `lanes` inputs at a time."""
    t = Text("f")
    y, pointers = t.arg(0), {name: t.arg(1 + i) for i, name in enumerate(tensors)}
    render = Renderer(t, [expr], pointers, coordinates(ROWS, COLUMNS))
    with t.loop(0, ROWS) as row, t.loop(0, COLUMNS, lanes) as start:
        at = t.broadcast(t.cast("trunci", start, "i32"), lanes)
        if lanes > 1:
            at = at + t.constants(range(lanes), "i32")
        value = render(expr, {"n": t.cast("trunci", row, "i32"), "k": at})
        value = value if value.count == lanes else t.broadcast(value, lanes)
        t.store(convert(t, value, expr.dtype, "f32"), y.at(row * COLUMNS + start, "f32"))
    out = torch.empty(ROWS, COLUMNS)
    Kernel(t.finish(), "f")([out, *tensors.values()])
    return out


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_equals_evaluation(name: str, lanes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "words": torch.randint(-(2**31), 2**31, (ROWS, COLUMNS), generator=generator).to(torch.int32),
        "halves": torch.randn(ROWS, COLUMNS, generator=generator).half(),
    }
    expr = EXPRESSIONS[name]
    expected = Reader(tensors, torch.arange(ROWS), torch.arange(COLUMNS))(expr).expand(ROWS, COLUMNS).float()
    torch.testing.assert_close(rendered(expr, tensors, lanes), expected, rtol=0, atol=0)


def test_what_has_no_text_is_refused() -> None:
    with pytest.raises(Refuse, match="'w' has 2147483648 elements"):
        check(load("w", "i32", (1 << 16, 1 << 15), n, k))
