"""Gives a causal language model its cache: one graph for prefill of any length and for decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._dynamo.source import ConstantSource
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic

from qcompile.dtypes import DTYPES
from qcompile.errors import CaptureError
from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import arguments, call, expression, fake_mode, is_call, substitute
from qcompile.program import Input, Program

qc = torch.ops.qcompile
BATCH, CAPACITY, MOST = "b", "c", 2**31 - 1
_HINT = 64  # any number that no other size of the graph has by chance


def _placeholder(program: Program, name: str, value: torch.Tensor) -> Node:
    """A new input of the graph, behind those that are there."""
    graph = program.graph.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta |= {"val": value, "module": "", "made_by": AddKvCache.name}
    return node


def _batch(program: Program) -> Any:
    """The size of the batch as the graph knows it."""
    for node, port in zip(program.graph.graph.nodes, program.inputs, strict=False):
        if BATCH in port.shape:
            return node.meta["val"].shape[port.shape.index(BATCH)]
    return 1


def _capacity(program: Program) -> Any:
    """A new symbolic size: the slots of the cache."""
    shapes = fake_mode(program).shape_env
    source = ConstantSource(CAPACITY)
    symbol = shapes.create_symbol(_HINT, source, DimDynamic.DYNAMIC, constraint_dim=None)
    return shapes.create_symintnode(symbol, hint=_HINT, source=source)


@dataclass(frozen=True)
class AddKvCache(Pass):
    """Each causal `qcompile.attention` becomes a `qcompile.cached_attention` with its own k and v cache.

    New inputs: `past` i64 [1] and `start` i64 [b]; new states: `k_cache_<i>`, `v_cache_<i>` [b, kv heads, c, D], in the dtype
    that the backend keeps caches in. Graphs that are no causal language model stay as they are.
    """

    name: ClassVar[str] = "add-kv-cache"

    def run(self, program: Program, ctx: Context) -> int:
        found = [n for n in program.graph.graph.nodes if is_call(n, qc.attention.default) and arguments(n)["causal"]]
        if program.kind != "causal-lm" or (found and not ctx.take()):
            return 0
        if not found:
            raise CaptureError(
                "no attention was found that could be given a cache",
                where=str(program.model_config.get("architectures") or "the model"),
                expected="causal attention through transformers' attention interface",
                remedy="pass example_inputs to compile it as a plain module, without a cache",
            )
        with fake_mode(program):
            types = torch.empty(1, dtype=torch.int64), torch.empty(_batch(program), dtype=torch.int64)
        ports = [_placeholder(program, name, value) for name, value in zip(("past", "start"), types, strict=True)]
        sizes: tuple[int | str, int | str] = (1, BATCH if isinstance(_batch(program), torch.SymInt) else 1)
        program.inputs += tuple(
            Input(name, "i64", (size,)) for name, size in zip(("past", "start"), sizes, strict=True)
        )  # fmt: skip
        capacity = _capacity(program)
        program.sizes[CAPACITY] = (1, MOST)
        for index, node in enumerate(found):
            given = arguments(node)
            caches = [
                self._cache(program, f"{c}_cache_{index}", given[c].meta["val"], capacity, ctx.backend.cache)
                for c in ("k", "v")
            ]
            made = call(
                node,
                qc.cached_attention.default,
                (given["q"], given["k"], given["v"], None, None, *caches, *ports, given["scale"], given["window"],
                 given["softcap"], given["sinks"]),
                self.name,
            )  # fmt: skip
            substitute(node, made)
        return len(found)

    def _cache(self, program: Program, name: str, like: torch.Tensor, capacity: Any, dtype: str) -> Node:
        batch, heads, _, width = like.shape
        with fake_mode(program):
            value = like.new_empty((batch, heads, capacity, width), dtype=DTYPES[dtype])
        named = {str(expression(_batch(program))): BATCH, str(expression(capacity)): CAPACITY}
        shape = tuple(named.get(str(expression(size)), size) for size in value.shape)
        program.states[name] = Input(name, dtype, shape)
        return _placeholder(program, name, value)
