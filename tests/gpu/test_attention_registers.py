"""Attention over a prompt keeps its sums, scores and queries in registers, whatever the width of a head; nothing is run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile import codec
from qcompile.lowering.triton.attention_prefill import Params, emit
from qcompile.lowering.triton.rows import Rows
from qcompile.lowering.triton.sass import profiles
from qcompile.lowering.triton.toolchain import compile_sources
from qcompile.target import target

CAPABILITIES = (80, 90, 100, 120)


def params(d: int, kind: str) -> Params:
    """A grouped model's attention to a cache; one with all that there is beside; that of few new tokens, whose keys are shared
    out; an encoder's, of rows that come as f32."""
    heads, kv = 16, 8
    plain = Params(
        heads // kv, kv, d, d, 0.1, causal=True, window=0, softcap=0.0, q=Rows("bf16", (-1, d, heads * d), 16), k=None, v=None,
        mask=None, cache="bf16", sinks="", compute="bf16", y="bf16", queries=0, part=0,
    )  # fmt: skip
    if kind == "cache":
        return plain
    if kind == "window, cap, sinks":
        return replace(plain, window=4096, softcap=50.0, sinks="f32")
    if kind == "parts":
        return replace(plain, window=4096, y="f32", queries=256, part=512)
    q, k = (Rows("f32", (-1, d, count * d), 16) for count in (heads, kv))
    return replace(plain, causal=False, q=q, k=k, v=k, mask=Rows("f32", (-1, 0, -1), 16), cache="", y="f32")


WIDTHS = (64, 128, 256, 512)
DAILY = [((256,), "cache", 90), ((128,), "cache", 80)]
FULL = [
    (WIDTHS, kind, capability)
    for capability in CAPABILITIES
    for kind in ("cache", "window, cap, sinks", "parts", "rows of f32")
]


@pytest.mark.parametrize(
    ("widths", "kind", "capability"), [*DAILY, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)]
)
def test_nothing_is_spilled(widths: tuple[int, ...], kind: str, capability: int) -> None:
    """In the loop over keys; numbers kept for the end of a program may lie in memory meanwhile, 64 bytes a thread at most."""
    code = target(f"cuda:sm_{capability}")
    made = compile_sources([emit(codec.encode(params(d, kind)), code) for d in widths], code)
    loops = [profile.main.spills for profile in profiles([built.object for built in made])]
    around = [built.launch.spills for built in made if built.launch is not None]
    assert loops == [0] * len(widths) and max(around) <= 64, (loops, around)
