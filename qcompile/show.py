"""A graph as text that reads like Python."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from qcompile.dtypes import NAMES

if TYPE_CHECKING:
    from qcompile.program import Program


class _Sizes:
    """The text of sizes: the graph's symbols by the names the program has for them, such as s27 -> b."""

    def __init__(self, program: Program):
        self.symbols: dict[Any, sympy.Symbol] = {}
        self.texts: dict[Any, str] = {}
        placeholders = [node for node in program.graph.graph.nodes if node.op == "placeholder"]
        for node, port in zip(placeholders, (*program.inputs, *program.states.values()), strict=False):
            for name, value in zip(port.shape, node.meta["val"].shape, strict=False):
                if isinstance(name, str) and isinstance(value, torch.SymInt):
                    self.symbols.setdefault(value.node.expr, sympy.Symbol(name))

    def text(self, value: Any) -> str:
        if not isinstance(value, torch.SymInt):
            return str(value)
        expr = value.node.expr
        if expr not in self.texts:
            self.texts[expr] = str(expr.xreplace(self.symbols))
        return self.texts[expr]


def _type(value: Any, sizes: _Sizes) -> str:
    """A value's dtype and shape: `f32[b, s, 64]`."""
    if isinstance(value, torch.Tensor):
        return f"{NAMES.get(value.dtype, value.dtype)}[{', '.join(sizes.text(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type(item, sizes) for item in value)})"
    return sizes.text(value)


def _format(data: dict[str, Any]) -> str:
    fields = ", ".join(f"{name}={value!r}" for name, value in data.items() if name not in ("kind", "table"))
    return f"{data.get('kind', '?')}({fields})"


def _spec(data: dict[str, Any]) -> str:
    """A `LinearSpec` in the order in which it computes, or an `ExpertsSpec`."""
    parts = [f"{data['experts']} experts of"] if "experts" in data else []
    if data.get("prologue"):
        parts.append(f"{data['prologue']['op']} ->")
    parts.append(" & ".join(f"{_format(part['format'])}[{part['n']}, {data['k']}]" for part in data["parts"]))
    if data.get("bias"):
        parts.append("+ bias")
    if data.get("gate"):
        parts.append(f"-> glu({data['gate']['act']})")
    if data.get("summed"):
        parts.append(f"-> sum of {data['summed']} times their shares")
    for step in data.get("epilogue", ()):
        parts.append(f"-> {step['op']}" + (f"({step['act']})" if "act" in step else ""))
    if data.get("accuracy", "exact") != "exact":
        parts.append(f"in {data['accuracy']}")
    return f'"{" ".join(parts)}"'


def _text(item: str) -> str:
    """A string argument; the JSON of formats and specs in short."""
    if item.startswith("{"):
        data = json.loads(item)
        return _spec(data) if "parts" in data else f'"{_format(data)}"'
    return repr(item)


def _argument(item: Any, sizes: _Sizes) -> str:
    if isinstance(item, Node):
        return item.name
    if isinstance(item, (list, tuple)):
        return f"[{', '.join(_argument(part, sizes) for part in item)}]"
    if isinstance(item, str):
        return _text(item)
    return sizes.text(item)


def _operation(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _lines(graph: Graph, sizes: _Sizes, owner: GraphModule, name: str) -> list[str]:
    inputs = [f"{n.target}: {_type(n.meta.get('val'), sizes)}" for n in graph.nodes if n.op == "placeholder"]
    lines, regions = [f"def {name}({', '.join(inputs)}):"], []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        arguments = [_argument(item, sizes) for item in node.args]
        arguments += [f"{key}={_argument(value, sizes)}" for key, value in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"    return {', '.join(_argument(item, sizes) for item in node.args[0])}")
            continue
        if node.op == "call_module":
            regions.append((node.target, getattr(owner, node.target)))
        where = f"  {node.meta['module']}" if node.meta.get("module") else ""
        typed = f"  # {_type(node.meta.get('val'), sizes)}{where}"
        lines.append(f"    {node.name} = {_operation(node)}({', '.join(arguments)}){typed}")
    for target, region in regions:
        lines += ["", *_lines(region.graph, sizes, region, target)]
    return lines


def show(program: Program) -> str:
    """The graph as Python-like text: its stored tensors, then a line for each node with its type and module path.

    Formats and linear specs are shortened to what a reader needs; the text is for reading and is never run.
    """
    sizes = _Sizes(program)
    stored = []
    for node in program.graph.graph.nodes:
        if node.op == "get_attr":
            tensor = program.tensors[node.meta["tensor"]]
            stored.append(f"{node.name}: {_type(tensor, sizes)} = '{node.meta['tensor']}'")
    lines = _lines(program.graph.graph, sizes, program.graph, "forward")
    return "\n".join([*stored, *([""] if stored else []), *lines]) + "\n"
