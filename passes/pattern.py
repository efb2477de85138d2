"""Patterns as pairs of Python functions: what to find in the graph, and what to put there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node, Proxy, symbolic_trace
from torch.fx.node import map_aggregate, map_arg
from torch.fx.proxy import GraphAppendingTracer

from qcompile.errors import InternalError
from qcompile.passes.base import Context, only_users
from qcompile.passes.graph import arguments, inherit, is_call, operator_name, substitute
from qcompile.program import Program

aten = torch.ops.aten
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


@dataclass
class Match:
    """Where a pattern was found: the `root` node, the value of each argument of `find`, and the nodes inside the match."""

    root: Node
    values: dict[str, Any]
    nodes: list[Node]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


@dataclass(frozen=True)
class Pattern:
    """Replace what `find` computes by what `replace` computes.

    Both take the same arguments, in order. `find` is traced once: each argument matches any value (the same value when
    it is named twice), each operator the same operator, each number itself; sums and products match in both orders.
    `replace` is called for each match with the values found: nodes as FX proxies, numbers, strings and None as they are.
    `where` may give a reason why a match must be left alone ("" for one not worth keeping). Nodes inside a match may not
    be used outside it, unless their operator is in `shared`: those stay for their other users.
    `key` is the operator that makes a failed attempt worth a refusal, once it is among the nodes that agree; without a key
    only what `where` says, and values used elsewhere, are refusals.
    """

    name: str
    find: Callable[..., Any]
    replace: Callable[..., Any]
    where: Callable[[Match], str | None] | None = None
    shared: frozenset[OpOverload] = frozenset()
    key: OpOverload | None = None


@dataclass
class _Failure:
    """The attempt that came furthest: how many nodes agreed, whether the key did, and why it ended."""

    depth: int = 0
    key_met: bool = False
    reason: str = ""


_State = dict[Node, Any]


@cache
def _traced(find: Callable[..., Any]) -> tuple[Graph, Node]:
    graph = symbolic_trace(find).graph
    root = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(root, Node) or root.op != "call_function":
        raise InternalError("a pattern does not end in an operator", where=find.__name__)
    return graph, root


def _orders(pattern: Node, node: Node) -> Iterator[dict[str, Any]]:
    given = arguments(node)
    yield given
    if pattern.target in COMMUTATIVE and given.get("alpha", 1) == 1:
        yield given | {"self": given["other"], "other": given["self"]}


def _agree(pattern: Any, found: Any) -> bool:
    """True for equal arguments. Numbers agree to 1e-8, since models write their constants with so many digits."""
    if isinstance(pattern, float) and isinstance(found, (int, float)):
        return math.isclose(pattern, found, rel_tol=1e-8)
    return bool(pattern == found) and isinstance(pattern, bool) == isinstance(found, bool)


class _Matcher:
    def __init__(self, key: OpOverload | None):
        self.key, self.failure = key, _Failure()

    def fail(self, state: _State, reason: str) -> None:
        calls = [node for node in state if node.op == "call_function"]
        if len(calls) > self.failure.depth:
            self.failure = _Failure(len(calls), any(node.target is self.key for node in calls), reason)

    def value(self, pattern: Any, found: Any, state: _State) -> Iterator[_State]:
        """Every way in which `found` agrees with `pattern`, each as what the pattern's nodes stand for."""
        if isinstance(pattern, Node):
            if pattern in state:
                if state[pattern] is found or (not isinstance(found, Node) and state[pattern] == found):
                    yield state
                else:
                    self.fail(state, f"{pattern.name} would have to be both {state[pattern]} and {found}")
            elif pattern.op == "placeholder":
                yield state | {pattern: found}
            else:
                yield from self.node(pattern, found, state)
        elif isinstance(pattern, (list, tuple)):
            if isinstance(found, (list, tuple)) and len(found) == len(pattern):
                yield from self.sequence(list(zip(pattern, found, strict=True)), state)
            else:
                self.fail(state, f"expected {len(pattern)} values, found {found}")
        elif _agree(pattern, found):
            yield state
        else:
            self.fail(state, f"expected {pattern}, found {found}")

    def node(self, pattern: Node, found: Any, state: _State) -> Iterator[_State]:
        if not is_call(found, cast(OpOverload, pattern.target)):
            what = f"{operator_name(found)} ({found.name})" if isinstance(found, Node) else repr(found)
            self.fail(state, f"expected {operator_name(pattern)}, found {what}")
            return
        wanted = arguments(pattern)
        for given in _orders(pattern, found):
            pairs = [(wanted[name], given[name]) for name in wanted]
            yield from self.sequence(pairs, state | {pattern: found})

    def sequence(self, pairs: list[tuple[Any, Any]], state: _State) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        for extended in self.value(*pairs[0], state):
            yield from self.sequence(pairs[1:], extended)


def match(pattern: Pattern, node: Node) -> Match | str | None:
    """The match of `pattern` that ends in `node`, the reason why there is none though the key agrees, or None."""
    graph, root = _traced(pattern.find)
    if not is_call(node, cast(OpOverload, root.target)):
        return None
    matcher = _Matcher(pattern.key)
    reason: str | None = ""
    for state in matcher.node(root, node, {}):
        values = {str(p.target): state.get(p) for p in graph.nodes if p.op == "placeholder"}
        inside = [found for p, found in state.items() if p.op == "call_function"]
        made = Match(node, values, inside)
        reason = _objection(pattern, made)
        if reason is None:
            return made
    if reason:
        return reason
    return matcher.failure.reason if matcher.failure.key_met else None


def _objection(pattern: Pattern, made: Match) -> str | None:
    for node in made.nodes:
        if node is not made.root and node.target not in pattern.shared:
            used = only_users(node, made.nodes)
            if used is not None:
                return used
    return pattern.where(made) if pattern.where is not None else None


def apply(pattern: Pattern, made: Match) -> Node:
    """Puts the replacement in front of the match's root, in its place; the node that now has the root's value."""
    root, graph = made.root, made.root.graph
    tracer = GraphAppendingTracer(graph)
    before = root.prev
    with graph.inserting_before(root):
        values = map_arg(tuple(made.values.values()), lambda node: cast(Any, Proxy(node, tracer)))
        result = map_aggregate(pattern.replace(*values), lambda x: x.node if isinstance(x, Proxy) else x)
    if not isinstance(result, Node):
        raise InternalError("a replacement is not a node", where=pattern.name, found=repr(result))
    node = before.next
    while node is not root:
        inherit(node, root, pattern.name)
        node = node.next
    substitute(root, result)
    for node in reversed([node for node in graph.nodes if node in set(made.nodes)]):
        if node is not root and not node.users:
            graph.erase_node(node)
    return result


def rewrite(program: Program, ctx: Context, *patterns: Pattern) -> int:
    """Applies each pattern wherever it matches, first pattern first; the number of replacements. Refusals are kept."""
    count = 0
    for pattern in patterns:
        for node in list(program.graph.graph.nodes):
            if node._erased:
                continue
            found = match(pattern, node)
            if isinstance(found, str):
                ctx.refuse(pattern.name, node, found)
            elif found is not None and ctx.take():
                apply(pattern, found)
                count += 1
    return count
