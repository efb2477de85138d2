"""Lowering of attention and rope on CUDA: over a cache, over a whole sequence, and with a mask."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch.fx import Node

from qcompile.artifact import Call, View
from qcompile.dims import Dim, times
from qcompile.lowering.alignment import divisor
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.symbolic import Strided
from qcompile.lowering.triton import attention_decode, attention_prefill, cache_write, combine, rope
from qcompile.lowering.triton.linear import compute_dtype
from qcompile.lowering.triton.rows import FLOATS, GIVEN, Rows, blocks, describe, packed


@dataclass(frozen=True)
class Shares:
    """How up to `queries` new positions share out the cache among programs.

    A part has `part` slots or more; its sums are written down and joined. There are as many as make about `programs` programs of
    one sequence.
    """

    queries: int
    part: int
    programs: int


# The sums of a part are as many bytes as the keys and values of a few slots for each query of a key head: more queries, longer
# parts. Beyond the last, blocks of queries are programs enough.
SHARES = (Shares(1, 64, 512), Shares(16, 128, 256), Shares(256, 512, 128))


def lower_cached_attention(node: Node, ctx: Context) -> None:
    q, k, v, cos, sin, k_cache, v_cache, past, start, scale, window, softcap, sinks = operands(node)
    if (cache := ctx.dtype(k_cache)) != ctx.dtype(v_cache):
        raise Refuse("the caches of keys and values differ in dtype")
    shared = _heads(ctx, q, k, v) | {
        "scale": scale, "window": _window(window), "softcap": softcap, "cache": cache,
        "width": _whole(ctx.shape(cos)[-1]) if cos is not None else 0,
    }  # fmt: skip
    rows = {name: packed(ctx, ctx.strided(item)) for name, item in (("q", q), ("k", k), ("v", v))}
    turn = _turn(ctx, cos, sin) if cos is not None else None
    state = [ctx.contiguous(k_cache), ctx.contiguous(v_cache), ctx.view(past)]
    extra = [] if sinks is None else [ctx.contiguous(sinks)]
    more = {"sinks": "" if sinks is None else ctx.strided(sinks).dtype, "y": ctx.dtype(node)}
    what = _Cached(
        ctx, rows, turn, shared, more, state, ctx.contiguous(start), extra, ctx.output(node),
        (ctx.shape(q)[0], ctx.shape(q)[2], ctx.shape(k_cache)[2]),
    )  # fmt: skip
    steps = what.sizes[1]
    if isinstance(steps, int):
        ctx.emit(*_calls(what, next((shares for shares in SHARES if steps <= shares.queries), None)))
    else:
        few = [((steps, shares.queries), _calls(what, shares)) for shares in SHARES]
        ctx.variants([*few, (None, _calls(what, None))])


@dataclass(frozen=True)
class _Cached:
    """A cached attention made ready: `rows` q, k, v; `turn` cos and sin; `sizes` B, S and the slots of the cache.

    `shared` are the parameters of all its kernels, `more` those of the one that writes the output `y`; `state` are the views of
    k_cache, v_cache and past.
    """

    ctx: Context
    rows: dict[str, Strided]
    turn: tuple[Strided, Strided] | None
    shared: dict[str, Any]
    more: dict[str, Any]
    state: list[View]
    start: View
    sinks: list[View]
    y: View
    sizes: tuple[Dim, Dim, Dim]

    @property
    def heads(self) -> int:
        count: int = self.shared["group"] * self.shared["kv_heads"]
        return count

    def most_parts(self, shares: Shares) -> int:
        each: int = shares.programs // self.shared["kv_heads"]
        return max(16, min(128, 1 << each.bit_length() - 1))

    def read(self, names: str, axes: tuple[int, ...]) -> tuple[dict[str, Any], list[View], list[Dim]]:
        """The rows `names` along `axes` of [B, H, S], then the tables: parameters, views, and dims."""
        found, dims = dict[str, Any](turn=None), list[Dim]()
        for name in names:
            found[name], given = describe(self.ctx, self.rows[name], axes)
            dims += given
        views = [self.ctx.view(self.rows[name]) for name in names]
        if self.turn:
            found["turn"], given = describe(self.ctx, self.turn[0], (0, 1)[: len(axes) - 1])
            dims += given
            views += [self.ctx.view(table) for table in self.turn]
        return found, views, dims


_Queries = tuple[Rows, View, list[Dim]]  # how they lie, where, and the strides that are given


def _calls(what: _Cached, shares: Shares | None) -> list[Call]:
    """The kernels for as many new positions as `shares` says, or for any number; of one position, two do everything."""
    if shares is None:
        q, calls = _ready(what)
        more = what.more | {"queries": 0, "part": 0}
        return [*calls, _attend(what, q, more, [*what.sinks, what.y], [])]
    b, s, capacity = what.sizes
    rows, dv, most = times(b, s, what.heads), what.shared["dv"], what.most_parts(shares)
    parts = shared_out(capacity, shares.part, most)
    sums, stats = what.ctx.temp((rows, parts, dv), "f32"), what.ctx.temp((rows, parts, 2), "f32")
    if shares.queries == 1:
        calls = [_decode(what, parts, sums, stats)]
    else:
        q, calls = _ready(what)
        more = {"sinks": "", "y": "f32", "queries": shares.queries, "part": shares.part}
        calls.append(_attend(what, q, more, [sums, stats], [parts]))
    join = combine.Params(what.heads, dv, most, **what.more)
    args = [sums, stats, *what.sinks, what.y]
    return [*calls, _call(what.ctx, combine, join, args, [times(b, s), parts], [len(args) - 1])]


def _decode(what: _Cached, parts: Dim, sums: View, stats: View) -> Call:
    """One query, turned, and parts of the keys; the new key and value go to the cache."""
    b, _, capacity = what.sizes
    read, views, dims = what.read("qkv", (0, 1))
    params = attention_decode.Params(**what.shared, **read)
    args, first = [*views, *what.state, what.start, sums, stats], len(views)
    writes = [first, first + 1, len(args) - 2, len(args) - 1]
    return _call(what.ctx, attention_decode, params, args, [b, capacity, parts, *dims], writes)


def _ready(what: _Cached) -> tuple[_Queries, list[Call]]:
    """Many queries, turned where they are to be, and what does that; first keys and values go to the cache."""
    ctx, shared, (b, s, capacity) = what.ctx, what.shared, what.sizes
    read, views, dims = what.read("kv", (0, 1, 2))
    names = {name: shared[name] for name in ("d", "dv", "width", "cache")}
    write = cache_write.Params(heads=shared["kv_heads"], **names, **read)
    args, first = [*views, *what.state], len(views)
    calls = [_call(ctx, cache_write, write, args, [b, s, capacity, *dims], [first, first + 1])]
    d, cache = shared["d"], shared["cache"]
    rows, (q, *tables), dims = what.read("q", (0, 1, 2))
    if not what.turn:
        return (rows["q"], q, dims), calls
    turned = ctx.temp((b, what.heads, s, d), cache)
    turn = rope.Params(what.heads, d, shared["width"], rows["q"], rows["turn"], cache)
    calls.append(_call(ctx, rope, turn, [q, *tables, turned], [b, s, *dims], [len(tables) + 1]))
    return (Rows(cache, (GIVEN, GIVEN, d), divisor(d)), turned, [times(what.heads, s, d), times(s, d)]), calls


def _attend(what: _Cached, queries: _Queries, more: dict[str, Any], views: list[View], parts: list[Dim]) -> Call:
    """Blocks of queries over the cache; `views` are those behind `start`."""
    rows, q, strides = queries
    shared = {name: value for name, value in what.shared.items() if name != "width"}
    cached = {"causal": True, "k": None, "v": None, "mask": None, "compute": shared["cache"]}
    params = attention_prefill.Params(**shared, **cached, **more, q=rows)
    k_cache, v_cache, past = what.state
    args = [q, k_cache, v_cache, past, what.start, *views]
    writes = [index for index, name in enumerate(params.pointers) if name in attention_prefill.RESULTS]
    return _call(what.ctx, attention_prefill, params, args, [*what.sizes, *parts, *strides], writes)


def shared_out(capacity: Dim, part: int, most: int) -> Dim:
    """Into how many parts a cache is cut: one for every `part` slots, or for a multiple of them so that there are at most `most`.

    >>> from qcompile.dims import evaluate
    >>> shared_out(200, 64, 64), shared_out(64 * 100, 64, 64), evaluate(shared_out("c", 64, 64), {"c": 6400})
    (4, 50, 50)
    """
    if isinstance(capacity, int):
        return blocks(capacity, part * (1 + capacity // (part * most)))
    slots = f"{part}*(1 + {capacity}//{part * most})"
    return f"({capacity} + {slots} - 1)//({slots})"


def lower_attention(node: Node, ctx: Context) -> None:
    q, k, v, scale, causal, window, softcap, sinks = operands(node)
    given = [] if sinks is None else [ctx.contiguous(sinks)]
    _whole_sequence(
        node, ctx, (q, k, v), given, ctx.output(node), scale=scale, causal=causal, window=_window(window),
        softcap=softcap, sinks="" if sinks is None else ctx.strided(sinks).dtype,
    )  # fmt: skip


def lower_sdpa(node: Node, ctx: Context) -> None:
    q, k, v, mask, dropout, causal, scale = operands(node, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None)
    if dropout:
        raise Refuse("attention with dropout")
    width = _whole(ctx.shape(q)[-1])
    found = None if mask is None else _mask(ctx, mask, ctx.shape(k)[2])
    _whole_sequence(
        node, ctx, (q, k, v), [], ctx.output_in_order(node, (0, 2, 1, 3)), found,
        scale=1.0 / math.sqrt(width) if scale is None else scale, causal=causal, window=0, softcap=0.0, sinks="",
    )  # fmt: skip


def lower_rope(node: Node, ctx: Context) -> None:
    x, cos, sin = operands(node)
    b, heads, s, d = ctx.shape(x)
    source, tables = packed(ctx, ctx.strided(x)), _turn(ctx, cos, sin)
    (rows, dims), (turn, turn_dims) = describe(ctx, source, (0, 1, 2)), describe(ctx, tables[0], (0, 1))
    y: Any = ctx.dtype(node)
    params = rope.Params(_whole(heads), _whole(d), _whole(ctx.shape(cos)[-1]), rows, turn, y)
    args = [ctx.view(source), *(ctx.view(table) for table in tables), ctx.output(node)]
    ctx.emit(_call(ctx, rope, params, args, [b, s, *dims, *turn_dims], [3]))


def _whole_sequence(
    node: Node, ctx: Context, qkv: tuple[Node, Node, Node], logits: list[View], output: View,
    mask: Strided | None = None, **what: Any,
) -> None:  # fmt: skip
    """Attention of all queries to keys that are all there; `logits` holds the view of the sinks, if there are any."""
    rows, dims, views = dict[str, Any](mask=None), list[Dim](), list[View]()
    found = {name: packed(ctx, ctx.strided(item)) for name, item in zip("qkv", qkv, strict=True)}
    for name, source in (found | ({"mask": mask} if mask is not None else {})).items():
        rows[name], given = describe(ctx, source, (0, 1, 2))
        dims += given
        views.append(ctx.view(source))
    y: Any = ctx.dtype(node)
    compute = compute_dtype(ctx.program)
    params = attention_prefill.Params(
        **_heads(ctx, *qkv), **what, **rows, cache="", compute=compute, y=y, queries=0, part=0
    )
    b, s, t = ctx.shape(qkv[0])[0], ctx.shape(qkv[0])[2], ctx.shape(qkv[1])[2]
    args = [*views, *logits, output]
    ctx.emit(_call(ctx, attention_prefill, params, args, [b, s, t, *dims], [len(args) - 1]))


def _call(ctx: Context, template: Any, params: Any, args: list[View], dims: list[Dim], writes: list[int]) -> Call:
    if problem := params.problem():
        raise Refuse(f"attention with {problem}")
    return ctx.call(template.TEMPLATE, asdict(params), args, dims, writes)


def _heads(ctx: Context, q: Node, k: Node, v: Node) -> dict[str, Any]:
    """group, kv_heads, d and dv of attention over q [B, H, S, D], k and v [B, Hkv, T, ...]."""
    if len(ctx.shape(q)) != 4:
        raise Refuse("attention without a head dimension")
    heads, kv_heads = _whole(ctx.shape(q)[1]), _whole(ctx.shape(k)[1])
    if heads % kv_heads:
        raise Refuse(f"{heads} query heads over {kv_heads} key heads")
    widths = {"d": _whole(ctx.shape(q)[3]), "dv": _whole(ctx.shape(v)[3])}
    return {"group": heads // kv_heads, "kv_heads": kv_heads, **widths}


def _turn(ctx: Context, cos: Node, sin: Node) -> tuple[Strided, Strided]:
    tables = packed(ctx, ctx.strided(cos)), packed(ctx, ctx.strided(sin))
    if tables[0].strides != tables[1].strides or tables[0].dtype != tables[1].dtype:
        raise Refuse("cos and sin differ in dtype or strides")
    return tables


def _mask(ctx: Context, node: Node, keys: Dim) -> Strided:
    """The mask with four dimensions."""
    source = ctx.strided(node)
    if ctx.shape(node)[-1] != keys:
        raise Refuse("an attention mask that does not tell keys apart")
    if source.dtype not in (*FLOATS, "bool"):
        raise Refuse(f"an attention mask of {source.dtype} elements")
    if not 2 <= len(source.shape) <= 4:
        raise Refuse(f"an attention mask of {len(source.shape)} dimensions")
    while len(source.shape) < 4:
        source = source.unsqueeze(0)
    return packed(ctx, source)


def _window(window: int) -> int:
    """The window; 0 for none, and for one that no sequence fills."""
    return window if window < 2**31 else 0


def _whole(size: Any) -> int:
    if not isinstance(size, int):
        raise Refuse(f"a head count or width that is known only at run time ({size})")
    return size
