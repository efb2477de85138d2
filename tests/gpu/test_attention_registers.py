"""Attention over a prompt keeps its sums, scores and queries in registers, whatever the width of a head; nothing is run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile import codec
from qcompile.lowering.triton.attention_prefill import Params, emit
from qcompile.lowering.triton.rows import Rows
from qcompile.lowering.triton.toolchain import compile_sources
from qcompile.target import target

CAPABILITIES = (80, 90, 100, 120)


def params(d: int, kind: str) -> Params:
    """A grouped model's attention to a cache; one with all that there is beside; an encoder's, of rows that come as f32."""
    heads, kv = 16, 8
    plain = Params(
        heads // kv, kv, d, d, 0.1, causal=True, window=0, softcap=0.0, q=Rows("bf16", (-1, d, heads * d), 16), k=None, v=None,
        mask=None, cache="bf16", sinks="", compute="bf16", y="bf16", queries=0, part=0,
    )  # fmt: skip
    if kind == "cache":
        return plain
    if kind == "window, cap, sinks":
        return replace(plain, window=4096, softcap=50.0, sinks="f32")
    q, k = (Rows("f32", (-1, d, count * d), 16) for count in (heads, kv))
    return replace(plain, causal=False, q=q, k=k, v=k, mask=Rows("f32", (-1, 0, -1), 16), cache="", y="f32")


DAILY = [(256, "cache", 90), (128, "cache", 80)]
FULL = [
    (d, kind, capability)
    for capability in CAPABILITIES
    for d in (64, 128, 256, 512)
    for kind in ("cache", "window, cap, sinks", "rows of f32")
    if (d, kind, capability) not in DAILY and (d, kind) != (512, "rows of f32")  # which no model has
]


@pytest.mark.parametrize(
    ("d", "kind", "capability"), [*DAILY, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)]
)
def test_nothing_is_spilled(d: int, kind: str, capability: int) -> None:
    code = target(f"cuda:sm_{capability}")
    (made,) = compile_sources([emit(codec.encode(params(d, kind)), code)], code)
    assert made.launch is not None and made.launch.spills == 0
