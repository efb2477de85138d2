"""The template "attention": many queries at once in blocks, with a running softmax over blocks of keys.

The rows of a block are queries x the heads that share a key head, so that a key is read once for all of them, and no group
is padded. Blocks that see the most keys start first. Where queries are few, programs share out a block's keys in parts, as
"attention-decode" does, and "attention-combine" joins the parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.lowering.extents import Float, numbers, outside, require
from qcompile.lowering.triton.attention_text import LOW, LOWEST, block_keys, dot, operand, scaled, softmax_step
from qcompile.lowering.triton.rope import pad, read
from qcompile.lowering.triton.rows import Rows, blocks
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import cast, module
from qcompile.target import Target

TEMPLATE = "attention"
LEAST_SCALE = 1e-20
RESULTS = ("y", "sums", "stats")


@dataclass(frozen=True)
class Params:
    """What one attention kernel computes.

    `group` query heads share one of `kv_heads` key heads; `d` and `dv` are the widths of keys and values. `causal`, `window`
    (0: none), `softcap` (0: none) as in qcompile.attention. q: rows [B, heads, S, d]. k, v: rows [B, kv_heads, T, ...]; None
    for a cache of dtype `cache`, where positions begin at `past` and keys before start[b] are not seen. mask: rows
    [B, heads, S, T] of an additive mask, or bools that say which keys are seen. `sinks`: dtype of the logits that only take
    share, "" for none. `compute`: of a dot's operands. `queries`: the most that a call has (0: any number). `part`: the fewest
    keys that make a part; 0: one program takes all keys of its queries and writes y, else the f32 sums of its part.
    """

    group: int
    kv_heads: int
    d: int
    dv: int
    scale: float
    causal: bool
    window: int
    softcap: float
    q: Rows
    k: Rows | None
    v: Rows | None
    mask: Rows | None
    cache: Literal["", "f32", "f16", "bf16"]
    sinks: Literal["", "f32", "f16", "bf16"]
    compute: Float
    y: Float
    queries: int
    part: int

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def rows(self) -> dict[str, tuple[Rows, str]]:
        """What is read by rows, and the names of their axes."""
        found = {"q": (self.q, "bhs"), "k": (self.k, "bhs"), "v": (self.v, "bhs"), "mask": (self.mask, "bhs")}
        return {name: (rows, axes) for name, (rows, axes) in found.items() if rows is not None}

    def problem(self) -> str:
        return (
            outside(
                self,
                group=1 <= self.group < 1 << 16,
                kv_heads=1 <= self.kv_heads < 1 << 16,
                d=1 <= self.d <= 512,
                dv=1 <= self.dv <= 512,
                window=0 <= self.window < 2**31,
                queries=0 <= self.queries < 1 << 16,
                part=0 <= self.part < 1 << 16,
                y=not self.part or self.y == "f32",
                sinks=not (self.part and self.sinks),  # which the kernel that joins the parts adds
                k=(self.k is None) == bool(self.cache),
                v=(self.v is None) == bool(self.cache),
                floats="bool" not in [rows.dtype for name, (rows, _) in self.rows.items() if name != "mask"],
            )
            or next((f"strides of {name}" for name, (rows, axes) in self.rows.items() if len(rows.steps) != len(axes)), "")
            or next((problem for rows, _ in self.rows.values() if (problem := rows.problem())), "")
        )  # fmt: skip

    @property
    def dims(self) -> list[str]:
        """B, S, T (the slots of a cache), P where keys are shared out in parts, then strides."""
        parts = ["parts"] if self.part else []
        return [
            "b",
            "s",
            "t",
            *parts,
            *(dim for name, (rows, axes) in self.rows.items() for dim in rows.given(name, axes)),
        ]

    @property
    def pointers(self) -> dict[str, str]:
        """Names and dtypes in order."""
        keys = {"k": self.cache or self.rows["k"][0].dtype, "v": self.cache or self.rows["v"][0].dtype}
        masks = {"mask": self.mask.dtype} if self.mask else {}
        places = {"past": "i64", "start": "i64"} if self.cache else {}
        sinks = {"sinks": self.sinks} if self.sinks else {}
        results = {"sums": self.y, "stats": self.y} if self.part else {"y": self.y}
        return {"q": self.q.dtype} | keys | masks | places | sinks | results


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    p, dim = params, dict(zip(params.dims, numbers(dims, len(params.dims)), strict=True))
    b, s, t = dim["b"], dim["s"], dim["t"]
    sizes = {
        "q": (b, p.heads, s, p.d), "k": (b, p.kv_heads, t, p.d), "v": (b, p.kv_heads, t, p.dv),
        "mask": (b, p.heads, s, t),
    }  # fmt: skip
    elements = {name: rows.reach(name, axes, sizes[name], dim) for name, (rows, axes) in p.rows.items()}
    if p.cache:
        elements |= {"k": b * p.kv_heads * t * p.d, "v": b * p.kv_heads * t * p.dv}
    if p.queries:
        require(s <= p.queries, "there are more queries than the kernel takes", s, p.queries)
    rows = b * s * p.heads * dim.get("parts", 1)
    elements |= {"past": 1, "start": b, "sinks": p.heads, "y": rows * p.dv, "sums": rows * p.dv, "stats": rows * 2}
    return [Extent(dtype, elements[name], name in RESULTS) for name, dtype in p.pointers.items()]


@dataclass(frozen=True)
class Tile:
    """Rows of queries x heads, keys of a step, and the warps that share them."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile(p: Params, capability: int) -> Tile:
    """The tile of a program: no more rows than a call has, in tiles that half as many warps hold."""
    most, rows = _widest(p, capability), max(16, pad(p.queries * p.group))
    return replace(most, rows=rows, warps=4) if p.queries and 2 * rows <= most.rows else most


def _widest(p: Params, capability: int) -> Tile:
    """The tile for any number of rows: as many rows and keys as registers hold. f32 dots have no tensor cores to feed, and twice
    the bytes.

    There is less room where rows come to be rounded, a number is added to each score, or keys are shared out, and where tensor
    cores cannot read their operands from shared memory (all but those of capability 9.x and 10.x).
    """
    width = pad(max(p.d, p.dv))
    if capability == 0:
        return Tile(16, 16, 4, 1)
    if p.compute == "f32":
        return Tile(32, min(block_keys(p.d, p.dv), 32), 4, 1)
    more = "f32" in [rows.dtype for rows, _ in p.rows.values()] or (p.mask is not None and p.mask.dtype != "bool")
    roomy = capability // 10 in (9, 10) and not more
    if width <= 128:
        return Tile(128, 64 if roomy or width <= 64 else 32, 8, 2)
    if width <= 256:
        rows = (128 if roomy else 64) // (2 if p.part else 1)
        return Tile(rows, 16 if more else 32, 8 if rows > 32 else 4, 2)
    return Tile(16 if more else 32, 16, 8, 2)


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers and dims: `Params.pointers`, `Params.dims`. y [B, S, heads, dv]."""
    p: Params = codec.decode(Params, params, TEMPLATE)
    size = tile(p, target.capability)
    body = [
        "head = tl.program_id(1).to(tl.int64)",
        "batch = tl.program_id(2).to(tl.int64)",
        f"if (head >= {p.kv_heads}) | (batch >= d0):",
        "    return",
        *_dims(p),
        *(["part = tl.program_id(0) % d3"] if p.part else []),
        f"block = (d1 * {p.group} - 1) // {size.rows} - tl.program_id(0){' // d3' if p.part else ''}",
        f"row = block * {size.rows} + tl.arange(0, {size.rows})",
        f"live = (row >= 0) & (row < d1 * {p.group})",
        f"at_query = tl.minimum(tl.maximum(row // {p.group}, 0), d1 - 1)",
        "position = at_query.to(tl.int64)",
        f"query = head * {p.group} + row % {p.group}",
        f"query_at = {p.q.at('q', 'bhs', b='batch', h='query', s='position')}",
        *read("x", "q", "query_at", "live", p.d),
        f"x = {operand('x', 'f32', p.compute, target)}",
        *_range(p, size),
        f"most = tl.full([{size.rows}], {LOWEST if _factor(p) is None else LOW}, tl.float32)",
        f"total = tl.zeros([{size.rows}], tl.float32)",
        f"acc = tl.zeros([{size.rows}, {pad(p.dv)}], tl.float32)",
        f"col = tl.arange(0, {pad(p.dv)})[None, :]",
        f"begin, end = low // {size.keys}, (high + {size.keys - 1}) // {size.keys}",
        *_shared_out(p),
        f"for step in range({'begin, end, parts' if p.part else 'begin, end'}):",
        *(f"    {line}" for line in _step(p, size, target)),
        *(_sums(p) if p.part else _result(p, target)),
    ]
    about = (
        f"y[b, i, h] = softmax(q[b, h, i] k[b, h / {p.group}, j] * {p.scale!r} over the keys j that i sees) v[b, h /"
        f" {p.group}].\n\nA program takes {size.rows} rows of queries x heads, {size.keys} keys a step. d0 = B, d1 = S, d2 = T"
        f"{', the slots of the cache' if p.cache else ''}{_about_parts(p)}."
    )
    text = module("attention", about, list(p.pointers), len(p.dims), "\n".join(body), target)
    count = blocks(f"d1*{p.group}", size.rows)
    grid = (times(count, "d3") if p.part else count, p.kv_heads, "d0")
    pointers = tuple(p.pointers.values())
    return Source(text, "attention", pointers, len(p.dims), grid, warps=size.warps, stages=size.stages)


def _dims(p: Params) -> list[str]:
    lines, first = [], 4 if p.part else 3
    for name, (rows, axes) in p.rows.items():
        lines += rows.lines(name, axes, first)
        first += len(rows.given(name, axes))
    return lines


def _range(p: Params, size: Tile) -> list[str]:
    """Statements: keys low .. high - 1 are all that the block's rows may see; each row sees `count` keys from `since` on.

    Both are [rows, 1] or numbers. `count` is unsigned: one comparison with it says whether a key's distance from `since` is
    neither below 0 nor too far.
    """
    if p.cache:
        lines = [
            "before = tl.minimum(tl.maximum(tl.load(past), 0), d2).to(tl.int32)",
            "first = tl.minimum(tl.maximum(tl.load(start + batch), 0), d2).to(tl.int32)",
            "keys = tl.minimum(before + d1, d2)",
        ]
    else:
        lines = ["before = d2 * 0", "first = d2 * 0", "keys = d2"]
    lines += ["low = first", "high = keys", "since = first", "until = keys - 1"]
    if p.window:
        lines += [
            f"low = tl.maximum(low, before + tl.maximum(block * {size.rows} // {p.group}, 0) - {p.window - 1})",
            f"since = tl.maximum(since, before + at_query - {p.window - 1})[:, None]",
        ]
    if p.causal:
        lines += [
            f"high = tl.minimum(high, before + (block * {size.rows} + {size.rows - 1}) // {p.group} + 1)",
            "until = tl.minimum(until, before + at_query)[:, None]",
        ]
    return [*lines, "count = tl.maximum(until - since + 1, 0).to(tl.uint32, bitcast=True)"]


def _step(p: Params, size: Tile, target: Target) -> list[str]:
    """Statements: one block of keys."""
    dtypes: tuple[str, str]
    if p.cache:
        where = f"((batch * {p.kv_heads} + head) * d2 + slot)"
        key_at, value_at = f"{where} * {p.d}", f"{where} * {p.dv}"
        dtypes = p.cache, p.cache
    else:
        (k, axes), (v, _) = p.rows["k"], p.rows["v"]
        places = {"b": "batch", "h": "head", "s": "slot"}
        key_at, value_at, dtypes = k.at("k", axes, **places), v.at("v", axes, **places), (k.dtype, v.dtype)
    key, value = (operand(name, dtype, p.compute, target) for name, dtype in zip(("key", "value"), dtypes, strict=True))
    score = dot("x", f"tl.trans({key})")
    lines = [
        f"at = step * {size.keys} + tl.arange(0, {size.keys})",
        "slot = at.to(tl.int64)",
        "there = ((at >= first) & (at < keys))[:, None]",
        f"key_at = {key_at}",
        f"key = tl.load(k + key_at[:, None] + x_col, mask=there & (x_col < {p.d}), other=0.0)",
        f"score = {score if _raw(p) else scaled(score, p.scale, p.softcap, 1 / math.log(2) if _factor(p) else 1.0)}",
        "seen = (at[None, :] - since).to(tl.uint32, bitcast=True) < count",
    ]
    if p.mask:
        # A mask that all heads and queries share is one row.
        shared = p.mask.steps[1:] == (0, 0)
        places = {"b": "batch", "h": "head", "s": "head"} if shared else {"b": "batch", "h": "query", "s": "position"}
        mask_at = p.mask.at("mask", "bhs", **places)
        live, mask_at = (
            ("there_all", f"({mask_at})") if shared else ("live[:, None] & there_all", f"({mask_at})[:, None]")
        )
        lines += [
            "there_all = (at < keys)[None, :]",
            f"given = tl.load(mask + {mask_at} + at[None, :], mask={live}, other=0)",
            "seen = seen & (given != 0)" if p.mask.dtype == "bool" else "score = score + given.to(tl.float32)",
        ]
    lines += [
        f"value_at = {value_at}",
        f"value = tl.load(v + value_at[:, None] + col, mask=there & (col < {p.dv}), other=0.0)",
    ]
    return [*lines, *softmax_step(p.compute, value, target, _factor(p))]


def _raw(p: Params) -> bool:
    """Whether scores are left unscaled until they are shares: with a scale that keeps their order, and `LOW` far below 0."""
    return not p.softcap and p.scale > LEAST_SCALE and (p.mask is None or p.mask.dtype == "bool")


def _factor(p: Params) -> float | None:
    """What makes a score an exponent of 2: 1 where it is one with its cap, None where a mask may make it the lowest number."""
    if p.mask is not None and p.mask.dtype != "bool":
        return None
    return p.scale / math.log(2) if _raw(p) else 1.0


def _about_parts(p: Params) -> str:
    return f", d3 = P; instead of y the sums and stats of part p, which has {p.part} keys or more" if p.part else ""


def _shared_out(p: Params) -> list[str]:
    """Statements: of the blocks begin .. end - 1, part p takes p, p + parts ...; `parts` is less than P for few keys."""
    if not p.part:
        return []
    return [
        f"parts = tl.minimum(d3, tl.maximum((high - low) // {p.part}, 1))",
        "begin = tl.where(part < parts, begin + part, end)",
    ]


def _sums(p: Params) -> list[str]:
    """Statements: what "attention-combine" joins; no sums where a row has seen no key."""
    return [
        f"place = ((batch * d1 + position) * {p.heads} + query) * d3 + part",
        "seen = live & (total > 0.0)",
        f"tl.store(sums + (place * {p.dv})[:, None] + col, acc, mask=seen[:, None] & (col < {p.dv}))",
        f"tl.store(stats + place * 2, {_most(p)}, mask=live)",
        "tl.store(stats + place * 2 + 1, total, mask=live)",
    ]


def _result(p: Params, target: Target) -> list[str]:
    """Statements: y, of all keys."""
    sinks = [
        f"most = {_most(p)}",
        "sink = tl.load(sinks + query, mask=live, other=0.0).to(tl.float32)",
        "new = tl.maximum(most, sink)",
        "keep = tl.exp(most - new)",
        "total = total * keep + tl.exp(sink - new)",
        "acc = acc * keep[:, None]",
    ]
    return [
        *(sinks if p.sinks else []),
        "result = acc * tl.where(total > 0.0, 1.0 / total, 0.0)[:, None]",
        f"place = ((batch * d1 + position) * {p.heads} + query) * {p.dv}",
        f"tl.store(y + place[:, None] + col, {cast('result', p.y, target)}, mask=live[:, None] & (col < {p.dv}))",
    ]


def _most(p: Params) -> str:
    """The text of the greatest score of each row, scaled."""
    factor = _factor(p)
    return "most" if factor is None else f"most * {factor * math.log(2)!r}"
