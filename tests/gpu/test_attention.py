"""CUDA attention kernels, interpreted, against eager: grouped heads, windows, caps, sinks, masks, caches part full, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gpu.triton_lowered import Interpreted, agrees, program_of

from qcompile import ops
from qcompile.lowering.triton import attention

assert ops
CAPACITY = 140
SHAPES = {  # batch, heads, key heads, D, Dv, rope columns
    "one head each, padding": (2, 1, 1, 10, 20, 6),
    "groups of three": (1, 6, 2, 24, 24, 24),
    "groups of four, padding": (2, 4, 1, 16, 9, 8),
}
KINDS = {  # window, softcap, rope, sinks
    "rope": (0, 0.0, True, False),
    "window, cap, sinks": (5, 2.0, False, True),
    "wide window": (70, 0.0, False, False),
}
PLACES = [(1, 0), (1, 139), (2, 0), (19, 60)]  # new positions, past
FEW = [
    ("one head each, padding", "rope"),
    ("groups of three", "window, cap, sinks"),
    ("groups of four, padding", "wide window"),
]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cached(window: int, softcap: float, rope: bool, sinks: bool) -> Callable[..., torch.Tensor]:
    """The operator over q [B, S, H, D] and k [B, S, Hkv, D], with cos and sin or sinks as its last arguments."""

    def call(q, k, v, k_cache, v_cache, past, start, cos=None, sin=None, logits=None):  # type: ignore[no-untyped-def]
        q, k = (torch.ops.aten.transpose.int(x, 1, 2) for x in (q, k))
        return torch.ops.qcompile.cached_attention.default(
            q, k, v, cos, sin, k_cache, v_cache, past, start, 0.2, window, softcap, logits
        )

    if rope:
        return lambda q, k, v, kc, vc, past, start, cos, sin: call(q, k, v, kc, vc, past, start, cos, sin)
    if sinks:
        return lambda q, k, v, kc, vc, past, start, logits: call(q, k, v, kc, vc, past, start, logits=logits)
    return lambda q, k, v, kc, vc, past, start: call(q, k, v, kc, vc, past, start)


def inputs(
    shape: tuple[int, ...], kind: tuple[Any, ...], s: int, past: int, dtype: torch.dtype, capacity: int = CAPACITY,
    starts: Sequence[int] = (),
) -> list[torch.Tensor]:  # fmt: skip
    (b, h, kv, d, dv, width), (_, _, rope, sinks) = shape, kind
    k_cache, v_cache = values(b, kv, capacity, d, seed=3).to(dtype), values(b, kv, capacity, dv, seed=4).to(dtype)
    k_cache[:, :, past:], v_cache[:, :, past:] = math.nan, math.nan  # what nobody may look at
    start = torch.tensor(starts or [0, min(past + s - 1, 7)][:b])
    given = [values(b, s, h, d), values(b, s, kv, d, seed=1), values(b, kv, s, dv, seed=2), k_cache, v_cache]
    given += [torch.tensor([past]), start]
    given += [values(1, s, width, seed=5), values(1, s, width, seed=6)] if rope else []
    return given + ([values(h, seed=7)] if sinks else [])


def cases() -> list[Any]:
    """Every shape and every kind once; all pairs in a full run."""
    pairs = [(shape, kind) for shape in SHAPES for kind in KINDS]
    return [pair if pair in FEW else pytest.param(*pair, marks=pytest.mark.full) for pair in pairs]


@pytest.mark.parametrize(("shape", "kind"), cases())
def test_cached_attention(shape: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHARES", [shares for shares in attention.SHARES if shares.queries <= 16])
    for s, past in PLACES:
        given = inputs(SHAPES[shape], KINDS[kind], s, past, torch.float32)
        made = agrees(cached(*KINDS[kind]), given)
        turn = ["rope"] if KINDS[kind][2] else []
        many = ["cache-write", *turn, "attention", *(["attention-combine"] if s <= 16 else [])]
        assert made.kernels == (["attention-decode", "attention-combine"] if s == 1 else many)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.full), torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["one head each, padding", "groups of three"])
def test_caches_of_16_bits(shape: str, dtype: torch.dtype) -> None:
    for s, past in ((1, 70), (7, 60)):
        given = inputs(SHAPES[shape], KINDS["rope"], s, past, dtype)
        agrees(cached(*KINDS["rope"]), given, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_the_same_input_gives_the_same_bits() -> None:
    for s, past in ((1, 70), (7, 270)):
        given = inputs(SHAPES["one head each, padding"], KINDS["rope"], s, past, torch.bfloat16, 300)
        made = Interpreted(program_of(cached(*KINDS["rope"]), *given))
        results = [made(*(x.clone() for x in given)) for _ in range(2)]
        assert torch.equal(*results)


EDGES = {  # shape as above, kind as above; new positions, past, capacity, starts
    "seven heads of one": ((2, 7, 1, 24, 20, 8), (0, 0.0, True, False), (3, 300, 320, [0, 299])),
    "to the last slot": ((1, 5, 1, 80, 96, 0), (0, 1.5, False, True), (16, 240, 256, [0])),
    "a window less than a block": ((1, 4, 2, 16, 16, 0), (3, 0.0, False, False), (5, 280, 300, [0])),
    "a window over parts": ((1, 4, 2, 16, 16, 0), (270, 0.0, False, False), (16, 340, 384, [60])),
    "queries that are padding": ((2, 4, 2, 16, 16, 0), (0, 0.0, False, True), (4, 20, 64, [24, 22])),
    "one query that is padding": ((2, 4, 2, 16, 16, 0), (0, 0.0, False, True), (1, 20, 64, [21, 20])),
    "one query, a window of itself": ((1, 3, 1, 16, 16, 0), (1, 0.0, False, False), (1, 128, 129, [0])),
    "longer parts": ((1, 2, 2, 16, 16, 0), (0, 0.0, False, False), (17, 1031, 1100, [3])),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str) -> None:
    """Rows that see nothing in some part, or nothing at all; ends at multiples of blocks, parts and the capacity."""
    shape, kind, (s, past, capacity, starts) = EDGES[edge]
    agrees(cached(*kind), inputs(shape, kind, s, past, torch.float32, capacity, starts))


def test_few_queries_share_out_the_cache() -> None:
    """How many parts there are follows from the number of new positions and the capacity; more than 256 take all keys each."""
    kind = KINDS["rope"]
    for s, parts in ((1, 11), (2, 6), (16, 6), (17, 2), (256, 2), (257, None)):
        given = inputs(SHAPES["groups of three"], kind, s, 10, torch.bfloat16, 700)
        lowered = Interpreted(program_of(cached(*kind), *given))
        last = lowered.executable.steps[-1].variants[-1].calls[-1]
        assert lowered.kernels[-1] == ("attention" if parts is None else "attention-combine")
        assert parts is None or last.dims == (s, parts)


def test_a_past_that_no_cache_has_writes_nothing() -> None:
    """A wrong number must not lead outside of the cache; what comes out of it is nobody's business."""
    for s in (1, 7):
        given = inputs(SHAPES["groups of three"], KINDS["rope"], s, 0, torch.float32)
        given[5] = torch.tensor([2**40])
        before = [x.clone() for x in given]
        Interpreted(program_of(cached(*KINDS["rope"]), *given))(*given)
        for mine, old in zip(given, before, strict=True):
            assert torch.equal(mine.nan_to_num(), old.nan_to_num())


def test_parts_of_a_cache() -> None:
    """A cache is cut by its capacity alone: a part has 64 slots, or a multiple where there would be too many."""
    from qcompile.dims import evaluate

    for capacity in (1, 64, 65, 4095, 4096, 4097, 1 << 17, 1 << 20):
        parts = evaluate(attention.shared_out("c", 64, 64), {"c": capacity})
        assert parts == attention.shared_out(capacity, 64, 64)
        assert 1 <= parts <= 64 and (capacity > 4095 or parts == -(-capacity // 64))


WHOLE = {  # batch, heads, key heads, D, Dv; causal, window, softcap, sinks
    "causal": ((1, 6, 2, 24, 10), (True, 0, 0.0, False)),
    "all": ((2, 2, 2, 16, 16), (False, 0, 0.0, False)),
    "causal window, sinks": ((1, 3, 1, 12, 12), (True, 5, 0.0, True)),
    "window, cap": ((1, 4, 2, 20, 16), (False, 6, 3.0, True)),
    "seven heads of one, a window of itself": ((1, 7, 1, 80, 96), (True, 1, 0.0, False)),
}


@pytest.mark.parametrize("case", WHOLE)
def test_attention_without_a_cache(case: str) -> None:
    (b, h, kv, d, dv), (causal, window, softcap, sinks) = WHOLE[case]

    def call(q: Any, k: Any, v: Any, logits: Any = None) -> Any:
        q = torch.ops.aten.transpose.int(q, 1, 2)
        return torch.ops.qcompile.attention.default(q, k, v, 0.2, causal, window, softcap, logits)

    given = [values(b, 19, h, d), values(b, kv, 19, d, seed=1), values(b, kv, 19, dv, seed=2)]
    function = (lambda q, k, v, logits: call(q, k, v, logits)) if sinks else (lambda q, k, v: call(q, k, v))
    made = agrees(function, [*given, values(h, seed=3)] if sinks else given, rtol=4e-3, atol=4e-3)
    assert made.kernels == ["attention"]


MASKS: dict[str, Callable[..., torch.Tensor]] = {
    "none": lambda b, h, s, t: torch.ones(0),
    "padding": lambda b, h, s, t: (values(b, 1, 1, t) > -1.0) | (torch.arange(t) == 0),
    "bool": lambda b, h, s, t: (values(b, h, s, t) > -0.5) | (torch.arange(t) == 0),
    "minus infinity": lambda b, h, s, t: torch.where(values(1, h, s, t) > 1.0, -math.inf, values(1, h, s, t)),
    "lowest": lambda b, h, s, t: torch.where(values(b, 1, 1, t) > 0.0, torch.finfo(torch.float32).min, 0.0),
    "rows": lambda b, h, s, t: values(s, t),
    "bool, rows of nothing": lambda b, h, s, t: values(b, 1, s, 1) > torch.where(torch.arange(t) < 9, 0.0, 2.0),
    "minus infinity, rows of nothing": lambda b, h, s, t: torch.where(
        values(b, 1, s, 1) > 0.0, values(s, t), -math.inf
    ),
}


@pytest.mark.parametrize("mask", MASKS)
def test_sdpa_with_a_mask(mask: str) -> None:
    b, h, s, t, d = 2, 3, 7, 21, 12
    given = [values(b, h, s, d), values(b, h, t, d, seed=1), values(b, h, t, d, seed=2)]
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    if mask == "none":
        made = agrees(lambda q, k, v: sdpa(q, k, v, None, 0.0, True), given, rtol=4e-3, atol=4e-3)
    else:
        made = agrees(lambda q, k, v, m: sdpa(q, k, v, m), [*given, MASKS[mask](b, h, s, t)], rtol=4e-3, atol=4e-3)
    assert made.kernels == ["attention", "pointwise"]  # the output is copied to the order of its dimensions


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-35])
def test_sdpa_with_a_scale_that_turns_scores(scale: float) -> None:
    given = [values(1, 2, 7, 12), values(1, 2, 21, 12, seed=1), values(1, 2, 21, 12, seed=2)]
    mask, sdpa = MASKS["bool, rows of nothing"](1, 2, 7, 21), torch.ops.aten.scaled_dot_product_attention.default
    agrees(lambda q, k, v, m: sdpa(q, k, v, m, scale=scale), [*given, mask], rtol=4e-3, atol=4e-3)


def test_rope_alone() -> None:
    for b, tables, s, width in ((2, 1, 19, 6), (2, 2, 1, 10)):
        given = [values(b, s, 3, 10), values(tables, s, width, seed=1), values(tables, s, width, seed=2)]
        made = agrees(
            lambda x, cos, sin: torch.ops.qcompile.rope.default(torch.ops.aten.transpose.int(x, 1, 2), cos, sin), given
        )
        assert made.kernels == ["rope"]


def test_rows_that_kernels_cannot_read_in_place_are_copied() -> None:
    """A slice that begins at no multiple of 16 bytes; the columns of a row apart from each other."""

    def function(x: Any, k: Any, v: Any) -> Any:
        q = torch.ops.aten.slice.Tensor(x, 3, 1, 9)
        return torch.ops.qcompile.attention.default(
            q, torch.ops.aten.transpose.int(k, 2, 3), v, 0.2, True, 0, 0.0, None
        )

    made = agrees(
        function, [values(1, 2, 5, 10), values(1, 2, 8, 5), values(1, 2, 5, 8)], rtol=4e-3, atol=4e-3
    )  # fmt: skip
    assert made.kernels == ["pointwise", "pointwise", "attention"]
