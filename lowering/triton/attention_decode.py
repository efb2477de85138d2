"""The template "attention-decode": one new query meets the cache, the keys shared out in parts; its key and value are cached.

Heads that share a key head share a program, so that a key is read once. Part p takes blocks p, p + P, ... of the slots from
the first that is seen on: as many parts are at work as there are blocks, whatever the capacity is. Part 0 also turns the new
key, writes it and its value to the cache, and starts its sums with them: no other part needs them. "attention-combine"
joins the parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import Float, numbers, outside
from qcompile.lowering.triton.attention_text import LOWEST, block_keys, dot, operand, rounded, scaled, softmax_step
from qcompile.lowering.triton.rope import pad, read
from qcompile.lowering.triton.rows import Rows
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import cast, module
from qcompile.target import Target

TEMPLATE = "attention-decode"
DOT_ROWS = 16  # of the smallest tile that tensor cores take
MOST_SUMS = 64 * 128  # rows x columns that the registers of four warps hold, with all that is around them


@dataclass(frozen=True)
class Params:
    """What the kernel computes: one query of `qcompile.cached_attention`.

    `group` query heads share one of `kv_heads` key heads; `d` and `dv` are the widths of keys and values, `width` the columns
    that are turned (0: none). q, k, v: the rows [B, heads or kv_heads, d or dv]; turn: those of cos and sin [B, width].
    `window` (0: none) and `softcap` (0: none) as in the operator. `cache`: the dtype of the cache, and of a dot's operands.
    """

    group: int
    kv_heads: int
    d: int
    dv: int
    scale: float
    window: int
    softcap: float
    width: int
    q: Rows
    k: Rows
    v: Rows
    turn: Rows | None
    cache: Float

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    def problem(self) -> str:
        return (
            outside(
                self,
                group=1 <= self.group <= 128,
                kv_heads=1 <= self.kv_heads < 1 << 16,
                d=1 <= self.d <= 512,
                dv=1 <= self.dv <= 512,
                window=0 <= self.window < 2**31,
                width=0 <= self.width <= self.d and self.width % 2 == 0,
                q=len(self.q.steps) == 2,
                k=len(self.k.steps) == 2,
                v=len(self.v.steps) == 2,
                turn=(self.turn is None or len(self.turn.steps) == 1) and (self.turn is None) == (self.width == 0),
            )
            or next((problem for rows in self.rows.values() if (problem := rows[0].problem())), "")
        )  # fmt: skip

    @property
    def rows(self) -> dict[str, tuple[Rows, str]]:
        """What is read by rows, and the names of their axes."""
        turn = {"turn": (self.turn, "b")} if self.turn else {}
        return {"q": (self.q, "bh"), "k": (self.k, "bh"), "v": (self.v, "bh"), **turn}

    @property
    def dims(self) -> list[str]:
        return ["b", "c", "parts", *(dim for name, (rows, axes) in self.rows.items() for dim in rows.given(name, axes))]

    @property
    def pointers(self) -> dict[str, str]:
        """Names and dtypes in order."""
        turns = {"cos": self.turn.dtype, "sin": self.turn.dtype} if self.turn else {}
        caches = {"k_cache": self.cache, "v_cache": self.cache, "past": "i64", "start": "i64"}
        return {
            "q": self.q.dtype, "k": self.k.dtype, "v": self.v.dtype, **turns, **caches, "sums": "f32", "stats": "f32",
        }  # fmt: skip


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    p, dim = params, dict(zip(params.dims, numbers(dims, len(params.dims)), strict=True))
    b, slots = dim["b"], dim["b"] * p.kv_heads * dim["c"]
    sizes = {"q": (b, p.heads, p.d), "k": (b, p.kv_heads, p.d), "v": (b, p.kv_heads, p.dv), "turn": (b, p.width)}
    read = {name: Extent(rows.dtype, rows.reach(name, axes, sizes[name], dim)) for name, (rows, axes) in p.rows.items()}
    found = read | {
        "cos": read.get("turn"), "sin": read.get("turn"), "k_cache": Extent(p.cache, slots * p.d, True),
        "v_cache": Extent(p.cache, slots * p.dv, True), "past": Extent("i64", 1), "start": Extent("i64", b),
        "sums": Extent("f32", b * p.heads * dim["parts"] * p.dv, True),
        "stats": Extent("f32", b * p.heads * dim["parts"] * 2, True),
    }  # fmt: skip
    return [extent for name in p.pointers if (extent := found[name]) is not None]


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers and dims: `Params.pointers`, `Params.dims` (B, C slots of the cache, P parts, strides).

    Of each head and part, sums [B, heads, P, dv] is the sum of exp(score - most) * v over its keys, and stats
    [B, heads, P, 2] are most and the sum of the shares, which is 0 where no key was seen (and sums is not written).
    """
    p: Params = codec.decode(Params, params, TEMPLATE)
    body = [
        "part = tl.program_id(0)",
        "head = tl.program_id(1).to(tl.int64)",
        "batch = tl.program_id(2).to(tl.int64)",
        f"if (part >= d2) | (head >= {p.kv_heads}) | (batch >= d0):",
        "    return",
        *_dims(p),
        "at = tl.minimum(tl.maximum(tl.load(past), 0), d1)",
        "first = tl.minimum(tl.maximum(tl.load(start + batch), 0), d1)",
        *([f"first = tl.maximum(first, at - {p.window - 1})"] if p.window else []),
        f"slots = (batch * {p.kv_heads} + head) * d1",
        *(_one_head(p, target) if p.group == 1 else _group(p, target)),
    ]
    about = (
        f"sums, stats of part p: the softmax of q k * {p.scale!r} times v over a part of the slots first .. past of the cache,"
        f" where slot past gets k and v.\n\nA program takes the blocks p, p + P ... of {_keys(p)} slots for the"
        f" {p.group} heads of a key head; part 0 also the new slot. d0 = B, d1 = C, the slots of the cache, d2 = P."
    )
    text = module("attention_decode", about, list(p.pointers), len(p.dims), "\n".join(body), target)
    grid = ("d2", p.kv_heads, "d0")
    pointers, sums = tuple(p.pointers.values()), _rows(p) * pad(max(p.d, p.dv))
    return Source(text, "attention_decode", pointers, len(p.dims), grid, warps=4 if sums <= MOST_SUMS else 8, stages=2)


def _keys(p: Params) -> int:
    """Slots of a block; a head of its own keeps a sum for each."""
    return block_keys(p.d, p.dv, 32 if p.group == 1 else 64)


def _rows(p: Params) -> int:
    """Rows of the tile of a group."""
    return max(pad(p.group), DOT_ROWS)


def _dims(p: Params) -> list[str]:
    lines, first = [], 3
    for name, (rows, axes) in p.rows.items():
        lines += rows.lines(name, axes, first)
        first += len(rows.given(name, axes))
    return lines


def _new_rows(p: Params, target: Target) -> list[str]:
    """Statements: `new_key` and `new_value` f32 [1, columns], rounded as the cache keeps them; both go to their slot."""
    at = {"b": "batch", "h": "head"}
    return [
        "one = tl.arange(0, 1)",
        f"key_at = one + ({p.k.at('k', 'bh', **at)})",
        f"value_at = one + ({p.v.at('v', 'bh', **at)})",
        *read("new_key", "k", "key_at", "(one == 0)", p.d, p.width, "(one + turn_at)"),
        *read("new_value", "v", "value_at", "(one == 0)", p.dv),
        "free = (one + at < d1)[:, None]",
        f"key_place = k_cache + (slots + at) * {p.d} + new_key_col",
        f"tl.store(key_place, {cast('new_key', p.cache, target)}, mask=free & (new_key_col < {p.d}))",
        f"value_place = v_cache + (slots + at) * {p.dv} + new_value_col",
        f"tl.store(value_place, {cast('new_value', p.cache, target)}, mask=free & (new_value_col < {p.dv}))",
        f"new_key = {rounded('new_key', p.cache, target)}",
        f"new_value = {rounded('new_value', p.cache, target)}",
    ]


def _query(p: Params, rows: int) -> list[str]:
    """Statements: `x` f32 [rows, columns], the turned queries of the group, and `place` [rows], where results go."""
    turn = [f"turn_at = {p.turn.at('turn', 'b', b='batch')}"] if p.turn else []
    return [
        f"row = tl.arange(0, {rows})",
        f"live = row < {p.group}",
        f"query = head * {p.group} + row",
        f"query_at = {p.q.at('q', 'bh', b='batch', h='query')}",
        *turn,
        *read("x", "q", "query_at", "live", p.d, p.width, "(row * 0 + turn_at)"),
        f"place = (batch * {p.heads} + query) * d2 + part",
    ]


def _blocks(p: Params, body: list[str]) -> list[str]:
    """Statements: `body` for every block of the part, whose `key` and `value` are loaded; `there` [keys] are the seen."""
    keys = _keys(p)
    return [
        f"lowest = first // {keys} * {keys}",
        f"blocks = ((at - lowest + {keys - 1}) // {keys}).to(tl.int32)",
        "for block in range(part, blocks, d2):",
        *_indented([
            f"slot = lowest + block * {keys} + tl.arange(0, {keys})",
            "there = (slot >= first) & (slot < at)",
            f"key_mask = there[:, None] & (x_col < {p.d})",
            f"key = tl.load(k_cache + ((slots + slot) * {p.d})[:, None] + x_col, mask=key_mask, other=0.0)",
            f"value_mask = there[:, None] & (col < {p.dv})",
            f"value = tl.load(v_cache + ((slots + slot) * {p.dv})[:, None] + col, mask=value_mask, other=0.0)",
            *body,
        ]),
    ]  # fmt: skip


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _group(p: Params, target: Target) -> list[str]:
    """The heads of a group as the rows of a dot."""
    rows, columns = _rows(p), pad(p.dv)
    key, value = (operand(name, p.cache, p.cache, target) for name in ("key", "value"))
    return [
        *_query(p, rows),
        f"x = {rounded('x', p.cache, target)}",
        f"col = tl.arange(0, {columns})[None, :]",
        f"most = tl.full([{rows}], {LOWEST}, tl.float32)",
        f"total = tl.zeros([{rows}], tl.float32)",
        f"acc = tl.zeros([{rows}, {columns}], tl.float32)",
        "if part == 0:",
        *_indented([
            *_new_rows(p, target),
            f"new_score = {scaled('tl.sum(x * new_key, 1)', p.scale, p.softcap)}",
            f"most = tl.where(at >= first, new_score, {LOWEST})",
            "total = tl.where(at >= first, total + 1.0, 0.0)",
            "acc = tl.where(at >= first, acc + new_value, 0.0)",
        ]),
        f"x = {operand('x', 'f32', p.cache, target)}",
        *_blocks(p, [
            f"score = {scaled(dot('x', f'tl.trans({key})'), p.scale, p.softcap)}",
            "seen = there[None, :] & (row >= 0)[:, None]",
            *softmax_step(p.cache, value, target),
        ]),
        "mine = live & (total != 0.0)",
        f"tl.store(sums + (place * {p.dv})[:, None] + col, acc, mask=mine[:, None] & (col < {p.dv}))",
        "tl.store(stats + place * 2, most, mask=live)",
        "tl.store(stats + place * 2 + 1, total, mask=live)",
    ]  # fmt: skip


def _one_head(p: Params, target: Target) -> list[str]:
    """A head of its own: each of the block's lanes keeps the softmax of its own keys, and they are joined at the end."""
    keys, columns = _keys(p), pad(p.dv)
    return [
        *_query(p, 1),
        f"col = tl.arange(0, {columns})[None, :]",
        f"lane = tl.arange(0, {keys})",
        f"most = tl.full([{keys}], {LOWEST}, tl.float32)",
        f"total = tl.zeros([{keys}], tl.float32)",
        f"acc = tl.zeros([{keys}, {columns}], tl.float32)",
        "if part == 0:",
        *_indented([
            *_new_rows(p, target),
            f"new_score = {scaled('tl.sum(tl.sum(x * new_key, 1), 0)', p.scale, p.softcap)}",
            "mine = (lane == 0) & (lane + first <= at)",
            "most = tl.where(mine, new_score, most)",
            "total = tl.where(mine, 1.0, total)",
            "acc = tl.where(mine[:, None], new_value, acc)",
        ]),
        *_blocks(p, [
            f"score = {scaled('tl.sum(x * key.to(tl.float32), 1)', p.scale, p.softcap)}",
            "new = tl.where(there, tl.maximum(most, score), most)",
            "keep = tl.exp(most - new)",
            "share = tl.where(there, tl.exp(score - new), 0.0)",
            "total = total * keep + share",
            "acc = acc * keep[:, None] + share[:, None] * value.to(tl.float32)",
            "most = new",
        ]),
        "top = tl.max(most, 0)",
        "keep = tl.exp(most - top)",
        "total_all = tl.sum(total * keep, 0)",
        "acc_all = tl.sum(acc * keep[:, None], 0)[None, :]",
        "if total_all != 0.0:",
        f"    tl.store(sums + (place * {p.dv})[:, None] + col, acc_all, mask=col < {p.dv})",
        "tl.store(stats + place * 2, top)",
        "tl.store(stats + place * 2 + 1, total_all)",
    ]  # fmt: skip
