"""Attention in blocks with a running softmax; a part of the keys at a time where few queries meet many keys.

Threads take turns over (batch, key head, block of queries, part of the keys). Inside, the rows are queries x the heads
that share a key head; keys come 64 or fewer at a time, transposed so that 16 scores are one vector. How work is cut
depends on shapes alone, so the number of threads does not change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompile.dtypes import itemsize
from qcompile.lowering.mlir import attention_params
from qcompile.lowering.mlir.attention_params import Attention
from qcompile.lowering.mlir.memory import first_lanes, load, store
from qcompile.lowering.mlir.rope import turn_row
from qcompile.lowering.mlir.text import Text, Value
from qcompile.lowering.mlir.vecmath import exp, tanh
from qcompile.target import Target

TEMPLATE = "attention"
LOWEST = -3.4028234663852886e38
Params, extents = attention_params.Attention, attention_params.extents


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args and dims: `Attention.args` and `Attention.dims`.

    t counts the keys; with a cache it is the capacity, and past + s keys are there. y is [B, S, H, dv], or for a split
    [B, S, H, parts, dv + 2]: the part's unscaled sum, its greatest score and the sum of its shares.
    """
    return _Writer(Attention(**params), target.lanes).finish()


class _Writer:
    """The text of one attention kernel in the making. Arrays in brackets are on the stack."""

    def __init__(self, what: Attention, lanes: int):
        self.what, self.lanes = what, lanes
        self.t = t = Text(TEMPLATE.replace("-", "_"), _about(what))
        self.arg = {name: t.arg(i) for i, name in enumerate(what.args())}
        self.dim = {name: t.dim(i) for i, name in enumerate(what.dims())}
        rows = what.queries * what.group
        most = 4 if lanes == 8 else 6  # 16 registers, else 32
        self.tile = rows if rows <= most else 4
        self.rows = -(-rows // self.tile) * self.tile
        self.vectors = min(2 if lanes == 8 else 4, what.keys // lanes)
        self.width = -(-what.dv // lanes) * lanes
        self.q = t.stack(self.rows * what.d, "f32")  # [rows, d], turned and scaled
        self.kt = t.stack(what.d * what.keys, "f32")  # [d, keys]
        self.p = t.stack(self.tile * what.keys, "f32")  # [tile, keys]
        self.sum = t.stack(self.rows * self.width, "f32")  # [rows, width]
        self.most = t.stack(self.rows, "f32")
        self.share = t.stack(self.rows, "f32")
        self.keep = t.stack(self.tile, "f32")
        self.type = f"vector<{lanes}xf32>"

    def finish(self) -> str:
        t, what = self.t, self.what
        s, t_keys = self.dim["s"], self.dim["t"]
        past = first_slot(t, self.arg["past"], t_keys) if what.cached else t.constant(0, "i64")
        keys = (past + s).least(t_keys) if what.cached else t_keys
        blocks = (s + (what.queries - 1)) // what.queries
        parts = (keys + (what.split - 1)) // what.split if what.split else t.constant(1, "i64")
        total = self.dim["b"] * what.kv_heads * blocks * parts
        # A block that is not full leaves the rest of [kt] as it was: whatever the stack held could be slow denormals.
        with t.loop(0, what.d * what.keys, self.lanes) as i:
            t.store(t.constant(0.0, self.type), self.kt.at(i, "f32"))
        with t.loop(self.t.thread, total, t.threads) as item:
            assert isinstance(item, Value)
            part, rest = item % parts, item // parts
            block, rest = rest % blocks, rest // blocks
            head, batch = rest % what.kv_heads, rest // what.kv_heads
            self._block(batch, head, block * what.queries, part, past, keys)
        return t.finish()

    def _block(self, batch: Value, head: Value, query: Value, part: Value, past: Value, keys: Value) -> None:
        """One block of queries from `query` on against its range of keys."""
        t, what = self.t, self.what
        last = (query + (what.queries - 1)).least(self.dim["s"] - 1)
        there = ((last + 1 - query) * what.group + (self.tile - 1)) // self.tile * self.tile
        self._read_queries(batch, head, query, there)
        zero, lowest = t.constant(0.0, self.type), t.constant(LOWEST, "f32")
        with t.loop(0, there * self.width, self.lanes) as i:
            t.store(zero, self.sum.at(i, "f32"))
        with t.loop(0, there) as r:
            t.store(lowest, self.most.at(r, "f32"))
            t.store(t.constant(0.0, "f32"), self.share.at(r, "f32"))
        first = t.load(self.arg["start"].at(batch, "i64"), "i64").most(0) if what.cached else t.constant(0, "i64")
        low, high = first, keys
        if what.window:
            low = low.most(query + past - (what.window - 1))
        if what.causal:
            high = high.least(last + past + 1)
        if what.split:
            low, high = low.most(part * what.split), high.least((part + 1) * what.split)
        with t.loop(low // what.keys * what.keys, high, what.keys) as key:
            self._fetch("v", what.dv, batch, head, key)
            self._transpose_keys(batch, head, key, keys)
            self._fetch("k", what.d, batch, head, key + (t.threads * what.split if what.split else what.keys))
            with t.loop(0, there, self.tile) as row:
                self._scores(row)
                self._shares(batch, head, query, row, key, past, first, keys)
                self._values(batch, head, row, key, (keys - key).least(what.keys))
        self._write(batch, head, query, part)

    def _place(self, row: Value, query: Value) -> tuple[Value, Value]:
        """Position (limited to the last) and head within the group of row number `row` of the block at `query`."""
        position = (query + row // self.what.group).least(self.dim["s"] - 1)
        return position, row % self.what.group

    def _offset(self, tensor: str, batch: Value, head: Value, position: Value) -> Value:
        return batch * self.dim[f"{tensor}_b"] + head * self.dim[f"{tensor}_h"] + position * self.dim[f"{tensor}_s"]

    def _read_queries(self, batch: Value, head: Value, query: Value, there: Value) -> None:
        """[q] = rope(q) * scale."""
        t, what = self.t, self.what
        with t.loop(0, there) as row:
            position, g = self._place(row, query)
            source = self._offset("q", batch, head * what.group + g, position)
            turns = None
            if what.rope:
                at = batch * self.dim["turn_b"] + position * self.dim["turn_s"]
                turns = (self.arg["cos"], self.arg["sin"], at, what.turn)
            turn_row(t, self.lanes, what.d, what.rope, (self.arg["q"], source, what.q),
                     (self.q, row * what.d, "f32"), turns, what.scale)  # fmt: skip

    def _fetch(self, tensor: str, width: int, batch: Value, head: Value, row: Value) -> None:
        """Asks for the rows of a block before they are needed; rows that are not there do no harm."""
        t, dtype = self.t, getattr(self.what, tensor)
        line = 64 // itemsize(dtype)
        base = self._offset(tensor, batch, head, row)
        with t.loop(0, self.what.keys) as i:
            for column in range(0, width, line):
                place = self.arg[tensor].at((base + i * self.dim[f"{tensor}_s"] + column) * itemsize(dtype))
                t.line(
                    f'"llvm.intr.prefetch"({place}) <{{rw = 0 : i32, hint = 3 : i32, cache = 1 : i32}}> : (!llvm.ptr) -> ()'
                )

    def _transpose_keys(self, batch: Value, head: Value, key: Value, keys: Value) -> None:
        """[kt][i, j] = k[key + j, i] for the vectors of keys that are there; the last key fills up the last vector."""
        t, what, lanes = self.t, self.what, self.lanes
        whole = what.d // lanes * lanes
        with t.loop(0, (keys - key).least(what.keys), lanes) as j:
            rows = [
                self._offset("k", batch, head, (key + j + lane).least(keys - 1)) for lane in range(lanes)
            ]  # fmt: skip
            with t.loop(0, whole, lanes) as i:
                self._transpose_tile(rows, i, j, lanes)
            if whole < what.d:
                self._transpose_tile(rows, t.constant(whole, "i64"), j, what.d - whole)

    def _transpose_tile(self, rows: Sequence[Value], i: Value, j: Value, count: int) -> None:
        t, lanes = self.t, self.lanes
        mask = None if count == lanes else t.constants([int(lane < count) for lane in range(lanes)], "i1")
        tile = [load(t, self.arg["k"], row + i, self.what.k, lanes, mask) for row in rows]
        for lane, column in enumerate(transpose(t, tile)[:count]):
            t.store(column, self.kt.at((i + lane) * self.what.keys + j, "f32"))

    def _scores(self, row: Value) -> None:
        """[p] = [q] rows x [kt]."""
        t, what = self.t, self.what
        zero = t.constant(0.0, self.type)
        with t.loop(0, what.keys, self.vectors * self.lanes) as j:
            sums = [zero] * (self.tile * self.vectors)
            sums = self._outer(sums, t.constant(what.d, "i64"), (self.q.at(row * what.d, "f32"), what.d),
                               lambda i, v: t.load(self.kt.at(i * what.keys + j + v * self.lanes, "f32"), self.type),
                               self.vectors)  # fmt: skip
            for r in range(self.tile):
                for v in range(self.vectors):
                    place = self.p.at(j + (r * what.keys + v * self.lanes), "f32")
                    t.store(sums[r * self.vectors + v], place)

    def _outer(self, sums: list[Value], count: Value, left: tuple[Value, int], right: Any, vectors: int) -> list[Value]:
        """sums[r][v] += left[r, i] * right(i, v) over i < count; `left` is a pointer and the stride of its rows."""
        t, (pointer, stride) = self.t, left
        with t.loop(0, count, carry=sums) as loop:
            columns = [right(loop.index, v) for v in range(vectors)]
            new = []
            for r in range(self.tile):
                factor = t.broadcast(t.load(pointer.at(loop.index + r * stride, "f32"), "f32"), self.lanes)
                new += [t.fma(factor, columns[v], loop.values[r * vectors + v]) for v in range(vectors)]
            loop.carry(new)
        return list(loop.results)

    def _shares(
        self, batch: Value, head: Value, query: Value, row: Value, key: Value, past: Value, first: Value, keys: Value
    ) -> None:
        """[p] = exp([p] - most), where `most` grows with this block; [keep] is what older sums are multiplied by."""
        t, what, lanes = self.t, self.what, self.lanes
        with t.loop(0, self.tile) as r:
            position, g = self._place(row + r, query)
            low, high = first, keys
            if what.causal:
                high = high.least(position + past + 1)
            if what.window:
                low = low.most(position + past - (what.window - 1))
                if not what.causal:
                    low = low.most(0)
            base = None
            if what.mask:
                base = self._offset("mask", batch, head * what.group + g, position)
            scores, seen = [], []
            for v in range(what.keys // lanes):
                x = t.load(self.p.at(r * what.keys + v * lanes, "f32"), self.type)
                if what.softcap:
                    x = tanh(x * (1.0 / what.softcap)) * what.softcap
                at = t.broadcast(key + v * lanes, lanes) + t.constants(range(lanes), "i64")
                sees = (at >= t.broadcast(low, lanes)) & (at < t.broadcast(high, lanes))
                if base is not None:
                    there = first_lanes(t, keys - key - v * lanes, lanes)
                    mask = load(t, self.arg["mask"], base + key + v * lanes, what.mask, lanes, there)
                    if what.mask == "bool":
                        sees = sees & mask
                    else:
                        x = x + mask
                scores.append(t.select(sees, x, LOWEST))
                seen.append(sees)
            old = t.load(self.most.at(row + r, "f32"), "f32")
            top = scores[0]
            for x in scores[1:]:
                top = top.most(x)
            most = t.reduce("maxnumf", top).most(old)
            wide, total = t.broadcast(most, lanes), t.constant(0.0, self.type)
            for v, (x, sees) in enumerate(zip(scores, seen, strict=True)):
                x = t.select(sees, exp(x - wide), 0.0)
                t.store(x, self.p.at(r * what.keys + v * lanes, "f32"))
                total = total + x
            keep = exp(old - most)
            share = self.share.at(row + r, "f32")
            t.store(t.fma(t.load(share, "f32"), keep, t.reduce("add", total)), share)
            t.store(most, self.most.at(row + r, "f32"))
            t.store(keep, self.keep.at(r, "f32"))

    def _values(self, batch: Value, head: Value, row: Value, key: Value, count: Value) -> None:
        """[sum] = [sum] * [keep] + [p] x v."""
        t, lanes, vectors = self.t, self.lanes, 2 if self.lanes == 8 else 4
        base = self._offset("v", batch, head, key)
        whole = self.what.dv // (lanes * vectors) * lanes * vectors
        with t.loop(0, whole, lanes * vectors) as i:
            self._value_columns(base, row, i, count, [None] * vectors)
        rest = self.what.dv - whole
        if rest:
            masks = [
                None if rest - at >= lanes else t.constants([int(at + lane < rest) for lane in range(lanes)], "i1")
                for at in range(0, rest, lanes)
            ]
            self._value_columns(base, row, t.constant(whole, "i64"), count, masks)

    def _value_columns(
        self, base: Value, row: Value, column: Value, count: Value, masks: Sequence[Value | None]
    ) -> None:
        t, what, lanes = self.t, self.what, self.lanes
        places = [
            self.sum.at((row + r) * self.width + column + v * lanes, "f32")
            for r in range(self.tile) for v in range(len(masks))
        ]  # fmt: skip
        keeps = [t.broadcast(t.load(self.keep.at(r, "f32"), "f32"), lanes) for r in range(self.tile)]
        sums = [t.load(place, self.type) * keeps[i // len(masks)] for i, place in enumerate(places)]
        sums = self._outer(
            sums, count, (self.p, what.keys),
            lambda j, v: load(
                t, self.arg["v"], base + j * self.dim["v_s"] + column + v * lanes, what.v, lanes, masks[v]
            ),
            len(masks),
        )  # fmt: skip
        for place, value in zip(places, sums, strict=True):
            t.store(value, place)

    def _write(self, batch: Value, head: Value, query: Value, part: Value) -> None:
        """y from [sum], [most] and [share], for the rows that are there."""
        t, what = self.t, self.what
        there = (self.dim["s"] - query).least(what.queries) * what.group
        with t.loop(0, there) as row:
            position, g = self._place(row, query)
            at = (batch * self.dim["s"] + position) * what.heads + head * what.group + g
            most, share = (t.load(array.at(row, "f32"), "f32") for array in (self.most, self.share))
            if what.split:
                at = (at * self.dim["parts"] + part) * (what.dv + 2)
                store(t, most, self.arg["y"], at + what.dv, "f32")
                store(t, share, self.arg["y"], at + (what.dv + 1), "f32")
                factor = t.constant(1.0, "f32")
            else:
                at = at * what.dv
                factor = final_factor(t, most, share, self.arg.get("sinks"), head * what.group + g, what.sinks)
            scale = t.broadcast(factor, self.lanes)
            for column in range(0, what.dv, self.lanes):
                left = what.dv - column
                mask = None if left >= self.lanes else t.constants([int(i < left) for i in range(self.lanes)], "i1")
                value = t.load(self.sum.at(row * self.width + column, "f32"), self.type) * scale
                store(t, value, self.arg["y"], at + column, "f32" if what.split else what.y, mask)


def final_factor(t: Text, most: Value, share: Value, sinks: Value | None, head: Value, dtype: str) -> Value:
    """What a sum of exp(score - most) * v is multiplied by to be the result; 0 where no key was seen."""
    keep = t.constant(1.0, "f32")
    if sinks is not None:
        sink = load(t, sinks, head, dtype)
        new = most.most(sink)
        keep = exp(most - new)
        share = t.fma(share, keep, exp(sink - new))
    return t.select(share > 0.0, keep / share, 0.0)


def first_slot(t: Text, past: Value, capacity: Value) -> Value:
    """The number at `past`, which is data: whatever it is, no slot outside the cache follows from it."""
    return t.load(past, "i64").most(0).least(capacity)


def transpose(t: Text, rows: Sequence[Value]) -> list[Value]:
    """The columns of a square tile of vectors, by log2 stages of shuffles."""
    tile, lanes = list(rows), len(rows)
    step = lanes // 2
    while step:
        for i in range(lanes):
            if i & step:
                continue
            a, b = tile[i], tile[i + step]
            low = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
            high = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
            tile[i], tile[i + step] = t.shuffle(a, b, low), t.shuffle(a, b, high)
        step //= 2
    return tile


def _about(what: Attention) -> str:
    return f"y[b, i, h] = softmax(q[b, h, i] k[b, h / group, j] * scale over the keys j that i sees) v[b, h / group]\n{what}"
