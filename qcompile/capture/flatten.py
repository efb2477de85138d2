"""From torch's ExportedProgram to one plain FX graph: tensors by name, no subgraphs, no checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from qcompile.errors import CaptureError

_CHECKS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)
_STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_COPY_OF_STACK = re.compile(r"@\d+")


@dataclass(frozen=True)
class Flat:
    """A flattened graph, its placeholder names in order, and the value of each stored tensor that it reads, by name."""

    graph: GraphModule
    inputs: tuple[str, ...]
    tensors: dict[str, torch.Tensor]


def module_path(node: Node, prefix: str) -> str:
    """The path of the innermost module that made `node`, without `prefix`; "" at the top."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack or stack[-1][0].startswith("_empty"):
        return ""
    path = _COPY_OF_STACK.sub("", stack[-1][0])
    return path.removeprefix(prefix) if path != prefix.rstrip(".") else ""


def is_pure(exported: ExportedProgram) -> bool:
    """True when no operator of the program writes to its arguments."""
    return not any(
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for module in exported.graph_module.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
    )


class _Flattener:
    def __init__(self, exported: ExportedProgram, name_of: Callable[[str], str], prefix: str):
        self.exported, self.name_of, self.prefix = exported, name_of, prefix
        self.graph, self.root = Graph(), torch.nn.Module()
        self.values: dict[str, torch.Tensor] = {}
        self.inputs: list[str] = []
        self.stored: dict[str, Node] = {}

    def refuse(self, what: str, node: Node | None = None, remedy: str = "") -> CaptureError:
        trace = (node.meta.get("stack_trace") or "").strip().splitlines() if node is not None else []
        line = trace[-2].strip() if len(trace) > 1 else ""
        place = f"{module_path(node, self.prefix) or 'the model'} {line}".strip() if node is not None else ""
        return CaptureError(what, where=place, found=node.format_node() if node is not None else "", remedy=remedy)

    def stored_node(self, target: str, value: Any, fake: Any) -> Node:
        """The `get_attr` node of a parameter, buffer or constant; one node however many names the tensor has."""
        name = self.name_of(target)
        if name not in self.stored:
            attribute = f"_t{len(self.stored)}_{re.sub(r'[^A-Za-z0-9]', '_', name)}"
            self.root.register_buffer(attribute, value)
            node = self.graph.get_attr(attribute)
            node.meta |= {"tensor": name, "val": fake, "module": name.rpartition(".")[0]}
            self.stored[name], self.values[name] = node, value
        return self.stored[name]

    def run(self, value_of: Callable[[str, torch.Tensor], torch.Tensor]) -> Flat:
        env: dict[Node, Any] = {}
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        used = [node for node in placeholders if node.users or specs[node.name].kind is InputKind.USER_INPUT]
        for node in used:
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(spec.arg, ConstantArgument):
                    env[node] = spec.arg.value
                    continue
                env[node] = self.graph.placeholder(node.name)
                env[node].meta |= {"val": node.meta["val"], "module": ""}
                self.inputs.append(node.name)
        for node in used:
            spec = specs[node.name]
            if spec.kind in _STORED:
                assert spec.target is not None
                env[node] = self.stored_node(spec.target, value_of(spec.target, node.meta["val"]), node.meta["val"])
            elif spec.kind is not InputKind.USER_INPUT:
                raise self.refuse(
                    f"the graph takes a {spec.kind.name.lower()}", node, "keep such objects out of forward"
                )
        self.graph.output(self.body(self.exported.graph_module, env))
        self.check_outputs()
        flat = GraphModule(self.root, self.graph)
        flat.graph.eliminate_dead_code()
        kept = {node.meta["tensor"] for node in flat.graph.nodes if node.op == "get_attr"}
        flat.recompile()
        return Flat(flat, tuple(self.inputs), {n: v for n, v in self.values.items() if n in kept})

    def check_outputs(self) -> None:
        for spec in self.exported.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise CaptureError(
                    "the model changes its own state when it runs",
                    where=str(spec.target),
                    expected="a model whose outputs depend on its inputs and parameters alone",
                    remedy="call model.eval() first, or return the new state as an output",
                )

    def body(self, module: GraphModule, env: dict[Node, Any]) -> Any:
        """Copies the nodes of `module`; `env` already holds its placeholders. The value of its output."""

        def mapped(value: Any) -> Any:
            return torch.fx.node.map_arg(value, lambda node: env[node])

        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return mapped(node.args[0])
            if node.op == "get_attr":
                env[node] = getattr(module, node.target)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                env[node] = self.inline(node, mapped(node.args))
            elif node.op == "call_module" or node.target in _CHECKS:
                continue  # the only module that torch.export calls is its guard on shapes
            elif node.target.__name__ == "getitem" and isinstance(env[node.args[0]], (tuple, list)):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self.graph.call_function(node.target, mapped(node.args), mapped(node.kwargs))
                env[node].meta |= {k: node.meta[k] for k in ("val", "stack_trace") if k in node.meta}
                env[node].meta["module"] = module_path(node, self.prefix)
        raise self.refuse("the exported graph has no output")

    def inline(self, node: Node, args: tuple[Any, ...]) -> Any:
        """The value of a subgraph that only runs under other settings of autograd or autocast."""
        name = str(node.target)
        at = next((i for i, arg in enumerate(args) if isinstance(arg, GraphModule)), None)
        settings = args[:at] if at is not None else ()
        allowed = name == "wrap_with_set_grad_enabled" or (name == "wrap_with_autocast" and settings[2] is False)
        if at is None or not allowed:
            remedy = "write the model without torch.cond, while_loop and autocast, or pass inputs that avoid them"
            raise self.refuse(f"the graph holds a region of the kind '{name}'", node, remedy)
        inner = args[at]
        holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
        return self.body(inner, dict(zip(holes, args[at + 1 :], strict=True)))


def flatten(
    exported: ExportedProgram,
    name_of: Callable[[str], str],
    value_of: Callable[[str, torch.Tensor], torch.Tensor],
    prefix: str = "",
) -> Flat:
    """One graph of operators from `exported`.

    `name_of` gives the name by which a parameter, buffer or constant (named as torch.export does) is stored; tensors
    with equal names become one node. `value_of` gives its value, from its torch.export name and FakeTensor. `prefix` is
    cut from module paths. Nodes have `meta["val"]`, `meta["module"]`, `meta["stack_trace"]`, and `meta["tensor"]` where
    they read a stored tensor.
    CaptureError for regions of control flow, and for models that write to their own state.
    """
    pure = exported if is_pure(exported) else exported.run_decompositions({})
    return _Flattener(pure, name_of, prefix).run(value_of)
