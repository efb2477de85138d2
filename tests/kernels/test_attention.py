"""Attention kernels against eager: grouped heads, windows, caps, sinks, masks, caches that are part full, padding, rope."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from lowered import Lowered, agrees

from qcompile import ops
from qcompile.lowering.mlir import attention_combine, attention_kernel, cache_write, toolchain
from qcompile.lowering.mlir.attention_kernel import Attention
from qcompile.target import CPU_LEVELS

assert ops
SHAPES = [  # batch, heads, key heads, D, Dv
    (1, 9, 3, 64, 64),
    (2, 4, 4, 10, 20),
    (2, 4, 1, 80, 16),
    (1, 2, 1, 192, 128),
]
KINDS = [  # causal, window, softcap, sinks
    (True, 0, 0.0, False),
    (False, 0, 0.0, False),
    (True, 5, 0.0, True),
    (True, 0, 2.0, False),
    (False, 6, 3.0, True),
]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_attention(shape: tuple[int, ...], kind: tuple[Any, ...]) -> None:
    (b, h, kv, d, dv), (causal, window, softcap, sinks) = shape, kind

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sinks: torch.Tensor) -> torch.Tensor:
        q = q.transpose(1, 2)
        return torch.ops.qcompile.attention(q, k, v, 0.2, causal, window, softcap, sinks[0] if sinks else None)

    def inputs(b: int, s: int) -> list[torch.Tensor]:
        given = [values(b, s, h, d), values(b, kv, s, d, seed=1), values(b, kv, s, dv, seed=2)]
        return [*given, values(h, seed=3)] if sinks else given

    for s in (2, 33, 130):
        x = inputs(b, s)
        one = Lowered(function, *x, threads=1)
        torch.testing.assert_close(one(*x), function(*x), rtol=2e-5, atol=2e-5)
        assert torch.equal(Lowered(function, *x, threads=2)(*x), one(*x))


MASKS = {
    "padding": lambda b, h, s, t: values(b, 1, 1, t) > -1.0,
    "bool": lambda b, h, s, t: (values(b, h, s, t) > -0.5) | (torch.arange(t) == 0),
    "additive": lambda b, h, s, t: values(b, 1, s, t) * 3,
    "additive with minus infinity": lambda b, h, s, t: torch.where(
        values(1, h, s, t) > 1.0, -math.inf, values(1, h, s, t)
    ),
    "lowest": lambda b, h, s, t: torch.where(values(b, 1, 1, t) > 0.0, torch.finfo(torch.float32).min, 0.0),
    "rows": lambda b, h, s, t: values(s, t),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("s", "t"), [(1, 1), (7, 7), (33, 70), (70, 33)])
def test_sdpa_with_a_mask(mask: str, s: int, t: int) -> None:
    b, h, d = 2, 3, 24
    q, k, v = values(b, h, s, d), values(b, h, t, d, seed=1), values(b, h, t, d, seed=2)
    given = MASKS[mask](b, h, s, t)
    if given.dtype == torch.bool:
        given[..., 0] = True
    agrees(
        lambda q, k, v, m: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m), q, k, v, given,
        rtol=2e-5, atol=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
def test_sdpa_without_a_mask(causal: bool) -> None:
    q, k, v = values(2, 6, 19, 16), values(2, 2, 19, 16, seed=1), values(2, 2, 19, 16, seed=2)
    made = agrees(
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=0.3, enable_gqa=True
        ).transpose(1, 2).reshape(2, 19, 96),
        q, k, v, rtol=2e-5, atol=2e-5,
    )  # fmt: skip
    assert made.kernels == ["attention"]


def test_sdpa_of_every_size() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (3, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q * 0.5, q + 1.0)

    made = Lowered(function, values(2, 9, 24), dynamic={0: "b", 1: "s"})
    for b, s in ((1, 1), (2, 2), (3, 33), (1, 197)):
        x = values(b, s, 24, seed=s)
        torch.testing.assert_close(made(x), function(x), rtol=2e-5, atol=2e-5)


CACHED = [  # shape, window, softcap, sinks, rope columns
    (SHAPES[0], 0, 0.0, False, 64),
    (SHAPES[0], 20, 0.0, True, 0),
    (SHAPES[1], 0, 3.0, False, 6),
    (SHAPES[2], 3, 0.0, False, 80),
    (SHAPES[3], 0, 0.0, True, 64),
]


def _cached(names: list[str], window: int, softcap: float) -> Callable[..., torch.Tensor]:
    """The operator with those of cos, sin and sinks that `names` lists as its last arguments."""

    def call(q, k, v, k_cache, v_cache, past, start, cos=None, sin=None, sinks=None):  # type: ignore[no-untyped-def]
        q, k = (torch.ops.aten.transpose.int(x, 1, 2) for x in (q, k))
        return torch.ops.qcompile.cached_attention.default(
            q, k, v, cos, sin, k_cache, v_cache, past, start, 0.2, window, softcap, sinks
        )

    if names == ["cos", "sin"]:
        return lambda q, k, v, k_cache, v_cache, past, start, cos, sin: call(
            q, k, v, k_cache, v_cache, past, start, cos, sin
        )
    if names == ["sinks"]:
        return lambda q, k, v, k_cache, v_cache, past, start, sinks: call(
            q, k, v, k_cache, v_cache, past, start, sinks=sinks
        )
    return call


@pytest.mark.parametrize("case", CACHED, ids=str)
@pytest.mark.parametrize(
    ("s", "past"), [(1, 0), (1, 5), (1, 63), (1, 64), (1, 199), (2, 0), (7, 60), (33, 0), (33, 90)]
)
def test_cached_attention(case: tuple[Any, ...], s: int, past: int) -> None:
    (b, h, kv, d, dv), window, softcap, sinks, width = case
    capacity = 200

    names = [*(["cos", "sin"] if width else []), *(["sinks"] if sinks else [])]
    function = _cached(names, window, softcap)
    begin = torch.tensor([0, min(past + s - 1, 7)][:b])
    k_cache, v_cache = values(b, kv, capacity, d, seed=3), values(b, kv, capacity, dv, seed=4)
    k_cache[:, :, past + s :], v_cache[:, :, past + s :] = math.nan, math.nan  # what nobody may look at
    inputs = [values(b, s, h, d), values(b, s, kv, d, seed=1), values(b, kv, s, dv, seed=2)]
    rest = [torch.tensor([past]), begin]
    if width:
        angle = values(1, s, width // 2, seed=5).repeat(1, 1, 2)
        rest += [angle.cos(), angle.sin()]
    if sinks:
        rest.append(values(h, seed=6))
    caches = [k_cache.clone(), v_cache.clone()]
    expected = function(*inputs, *caches, *rest)
    made = Lowered.traced(function, *inputs, k_cache, v_cache, *rest, threads=2)
    assert ("attention-combine" in made.kernels) == (s == 1)
    found = made(*inputs, k_cache, v_cache, *rest)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    one = Lowered.traced(function, *inputs, k_cache, v_cache, *rest, threads=1)
    assert torch.equal(one(*inputs, k_cache, v_cache, *rest), found)


@pytest.mark.parametrize("width", [64, 6, 30])
def test_rope(width: int) -> None:
    angle = values(2, 5, width // 2, seed=5).repeat(1, 1, 2)
    agrees(
        lambda x, cos, sin: torch.ops.qcompile.rope(x.transpose(1, 2), cos, sin),
        values(2, 5, 3, 64), angle.cos(), angle.sin(),
    )  # fmt: skip


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_compiles_everywhere_without_calls(level: str) -> None:
    target = CPU_LEVELS[level]
    what = Attention(3, 3, 64, 64, 16, 0.125, window=9, softcap=2.0, mask="bool", sinks="f32", k="f16", v="bf16")
    split = Attention(3, 3, 64, 64, 1, 0.125, cached=True, rope=64, split=64)
    combine = {"heads": 9, "dv": 64, "split": 64, "sinks": "", "y": "f32"}
    write = {
        "heads": 3,
        "d": 64,
        "dv": 64,
        "width": 64,
        **dict.fromkeys(("k", "v", "turn", "k_cache", "v_cache"), "f32"),
    }
    for text in (
        attention_kernel.emit(asdict(what), target), attention_kernel.emit(asdict(split), target),
        attention_combine.emit(combine, target), cache_write.emit(write, target),
    ):  # fmt: skip
        code = toolchain.assembly(text, target)
        calls = [line for line in code.splitlines() if line.split()[:1] in (["call"], ["callq"], ["bl"])]
        assert all("memset" in line for line in calls)  # which LLVM makes of a loop that stores zeros
