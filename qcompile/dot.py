"""A compiled model's graph in the DOT language, which Graphviz draws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qcompile.artifact import Graph


def dot(graph: Graph) -> str:
    """The data flow from inputs and states through operations to outputs; stored tensors are left out."""
    lines = ["digraph program {", "  node [shape=box, fontname=monospace];"]
    for buffer in (*graph.inputs, *graph.states):
        lines.append(_box(buffer.name, buffer.name, f"{buffer.dtype}[{', '.join(map(str, buffer.shape))}]"))
    for node in graph.nodes:
        lines.append(_box(node.name, node.name, node.op, node.module))
        lines += _edges(node.name, [node.args, node.kwargs])
    for name, value in graph.outputs.items():
        lines.append(_box(f"output {name}", f"output {name}"))
        lines += _edges(f"output {name}", value)
    return "\n".join([*lines, "}"]) + "\n"


def _box(name: str, *label: str) -> str:
    return f"  {json.dumps(name)} [label={json.dumps(chr(10).join(filter(None, label)))}];"


def _edges(name: str, literal: Any) -> list[str]:
    """An edge from each value that a node's arguments mention."""
    return [f"  {json.dumps(source)} -> {json.dumps(name)};" for source in dict.fromkeys(_sources(literal))]


def _sources(literal: Any) -> Iterator[str]:
    if isinstance(literal, dict):
        for key, value in literal.items():
            yield from [value] if key == "node" and isinstance(value, str) else _sources(value)
    elif isinstance(literal, (list, tuple)):
        for item in literal:
            yield from _sources(item)
