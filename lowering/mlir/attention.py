"""Lowering of attention and rope: over a cache, over a whole sequence, and with a mask."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from torch.fx import Node

from qcompile.artifact import Call, View
from qcompile.dims import Dim, plus, times
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.mlir.attention_params import Attention
from qcompile.lowering.mlir.memory import FLOATS

ROWS = 64  # of a block: queries x heads that share a key head
STACK = 16384  # floats that the rows of a block may take
SPLIT = 64  # keys of one part where a single query meets the cache


def lower_cached_attention(node: Node, ctx: Context) -> None:
    q, k, v, cos, sin, k_cache, v_cache, past, start, scale, window, softcap, sinks = operands(node)
    what, tensors = _describe(ctx, q, k_cache, v_cache, scale)
    shape = ctx.shape(q)
    new = {"k": _rows(ctx, k), "v": _rows(ctx, v)}
    turns = {"cos": _rows(ctx, cos), "sin": _rows(ctx, sin)} if cos is not None else {}
    width = _whole(ctx.shape(cos)[-1]) if cos is not None else 0
    turn = ctx.strided(cos).dtype if cos is not None else "f32"
    if cos is not None and (turn != ctx.strided(sin).dtype or turns["cos"].strides != turns["sin"].strides):
        raise Refuse("cos and sin differ in dtype or strides")
    turn_dims = [_stride(turns["cos"], 0), _stride(turns["cos"], 1)] if turns else []
    position = {"past": ctx.view(past), "start": ctx.contiguous(start)}
    what = replace(
        what, window=window, softcap=softcap, rope=width, turn=turn, cached=True, y=ctx.dtype(node),
        sinks=ctx.strided(sinks).dtype if sinks is not None else "",
    )  # fmt: skip
    output = ctx.output(node)
    capacity = ctx.shape(k_cache)[2]
    params = {
        "heads": what.kv_heads, "d": what.d, "dv": what.dv, "width": width, "turn": turn, "k_cache": what.k,
        "v_cache": what.v, "k": ctx.strided(k).dtype, "v": ctx.strided(v).dtype,
    }  # fmt: skip
    caches = [tensors["k"], tensors["v"]]
    args = [new["k"], new["v"], *turns.values(), *caches, position["past"]]
    dims = [shape[0], shape[2], capacity, *_strides(new["k"]), *_strides(new["v"]), *turn_dims]
    first = len(args) - 3
    ctx.emit(ctx.call("cache-write", params, args, dims, [first, first + 1]))
    tensors |= turns | position | ({"sinks": ctx.contiguous(sinks)} if sinks is not None else {})
    sizes = [shape[0], shape[2], capacity]
    one = _split(ctx, what, tensors, sizes, turn_dims, output)
    many = [_call(ctx, what, tensors, sizes, turn_dims, output)]
    if isinstance(shape[2], int):
        ctx.emit(*(one if shape[2] == 1 else many))
    else:
        ctx.variants([((shape[2], 1), one), (None, many)])


def lower_attention(node: Node, ctx: Context) -> None:
    q, k, v, scale, causal, window, softcap, sinks = operands(node)
    what, tensors = _describe(ctx, q, k, v, scale)
    what = replace(
        what, causal=causal, window=window, softcap=softcap, y=ctx.dtype(node),
        sinks=ctx.strided(sinks).dtype if sinks is not None else "",
    )  # fmt: skip
    if sinks is not None:
        tensors["sinks"] = ctx.contiguous(sinks)
    shape = ctx.shape(q)
    ctx.emit(_call(ctx, what, tensors, [shape[0], shape[2], ctx.shape(k)[2]], [], ctx.output(node)))


def lower_sdpa(node: Node, ctx: Context) -> None:
    q, k, v, mask, dropout, causal, scale = operands(node, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None)
    if dropout:
        raise Refuse("attention with dropout")
    width = _whole(ctx.shape(q)[-1])
    what, tensors = _describe(ctx, q, k, v, 1.0 / math.sqrt(width) if scale is None else scale)
    extra: list[Dim] = []
    if mask is not None:
        tensors["mask"] = view = _mask(ctx, mask, ctx.shape(k)[2])
        what = replace(what, mask=ctx.strided(mask).dtype)
        lead = 4 - len(view.shape)
        extra += [0] * lead
        extra += [0 if size == 1 else step for size, step in zip(view.shape[:-1], view.strides, strict=False)]
    what = replace(what, causal=causal, y=ctx.dtype(node))
    shape = ctx.shape(q)
    output = ctx.output_in_order(node, (0, 2, 1, 3))
    ctx.emit(_call(ctx, what, tensors, [shape[0], shape[2], ctx.shape(k)[2]], extra, output))


def lower_rope(node: Node, ctx: Context) -> None:
    x, cos, sin = operands(node)
    b, heads, s, d = ctx.shape(x)
    views = [_rows(ctx, item) for item in (x, cos, sin)]
    if views[1].strides != views[2].strides or ctx.strided(cos).dtype != ctx.strided(sin).dtype:
        raise Refuse("cos and sin differ in dtype or strides")
    params = {
        "heads": _whole(heads), "d": _whole(d), "width": _whole(ctx.shape(cos)[-1]), "x": ctx.strided(x).dtype,
        "turn": ctx.strided(cos).dtype, "y": ctx.dtype(node),
    }  # fmt: skip
    dims = [b, s, *_strides(views[0]), _stride(views[1], 0), _stride(views[1], 1)]
    ctx.emit(ctx.call("rope", params, [*views, ctx.output(node)], dims, [3]))


def _describe(ctx: Context, q: Node, k: Node, v: Node, scale: float) -> tuple[Attention, dict[str, View]]:
    """The shapes and dtypes of attention over q [B, H, S, D], k and v [B, Hkv, T, ...], and the three views."""
    if len(ctx.shape(q)) != 4:
        raise Refuse("attention without a head dimension")
    heads, kv_heads = _whole(ctx.shape(q)[1]), _whole(ctx.shape(k)[1])
    d, dv = _whole(ctx.shape(q)[3]), _whole(ctx.shape(v)[3])
    if heads % kv_heads:
        raise Refuse(f"{heads} query heads over {kv_heads} key heads")
    group = heads // kv_heads
    views = {name: _rows(ctx, item) for name, item in (("q", q), ("k", k), ("v", v))}
    queries = max(1, min(ROWS, STACK // (d + dv)) // group)
    dtypes = [ctx.strided(item).dtype for item in (q, k, v)]
    return Attention(group, kv_heads, d, dv, queries, scale, q=dtypes[0], k=dtypes[1], v=dtypes[2]), views


def _call(
    ctx: Context, what: Attention, tensors: dict[str, View], sizes: list[Dim], extra: list[Dim], output: View,
    parts: list[Dim] | None = None,
) -> Call:  # fmt: skip
    """The call of the attention kernel; `extra` are the strides of the mask or of cos and sin."""
    if problem := what.problem():
        raise Refuse(f"attention with {problem}")
    args = [*(tensors[name] for name in what.args()[:-1]), output]
    dims = [*sizes, *(step for name in "qkv" for step in _strides(tensors[name])), *extra, *(parts or [])]
    return ctx.call("attention", asdict(what), args, dims, [len(args) - 1])


def _split(
    ctx: Context, what: Attention, tensors: dict[str, View], sizes: list[Dim], extra: list[Dim], output: View
) -> list[Call]:
    """One query at a time: its keys in parts over all threads, then the parts joined."""
    parts: Dim = f"({plus(sizes[2], SPLIT - 1)}) // {SPLIT}" if isinstance(sizes[2], str) else -(-sizes[2] // SPLIT)
    scratch = ctx.temp((times(sizes[0], what.heads), parts, what.dv + 2), "f32")
    split = replace(what, queries=1, split=SPLIT)
    attend = _call(ctx, split, tensors, sizes, extra, scratch, [parts])
    params = {"heads": what.heads, "dv": what.dv, "split": SPLIT, "sinks": what.sinks, "y": what.y}
    args = [scratch, tensors["past"], *([tensors["sinks"]] if what.sinks else []), output]
    return [attend, ctx.call("attention-combine", params, args, [*sizes, parts], [len(args) - 1])]


def _rows(ctx: Context, node: Node) -> View:
    """A view of floats whose last dimension lies together."""
    source = ctx.strided(node)
    if source.dtype not in FLOATS:
        raise Refuse(f"attention over {source.dtype} elements")
    return ctx.view(source) if source.strides[-1] == 1 else ctx.contiguous(source)


def _mask(ctx: Context, node: Node, keys: Dim) -> View:
    source = ctx.strided(node)
    if ctx.shape(node)[-1] != keys:
        raise Refuse("an attention mask that does not tell keys apart")
    if source.dtype not in (*FLOATS, "bool"):
        raise Refuse(f"an attention mask of {source.dtype} elements")
    if len(source.shape) > 4 or len(source.shape) < 2:
        raise Refuse(f"an attention mask of {len(source.shape)} dimensions")
    return ctx.view(source) if source.strides[-1] == 1 else ctx.contiguous(source)


def _strides(view: View) -> list[Dim]:
    """Strides in elements of the first three dimensions."""
    return list(view.strides[:3])


def _stride(view: View, axis: int) -> Dim:
    return 0 if view.shape[axis] == 1 else view.strides[axis]


def _whole(size: Any) -> int:
    if not isinstance(size, int):
        raise Refuse(f"a head count or width that is known only at run time ({size})")
    return size
