"""Small facts and edits of FX graphs: arguments by name, types of new nodes, equal shapes, stored tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from qcompile import ops  # noqa: F401  (patterns name its operators)
from qcompile.errors import InternalError
from qcompile.program import Program


def operator_name(node: Node) -> str:
    """The node's operator as people write it: `aten.add.Tensor`, `qcompile.linear`."""
    return str(node.target).removesuffix(".default") if node.op.startswith("call") else node.op


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of a node that calls an operator, by its schema name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    return {
        a.name: given[a.name] if a.name in given else a.default_value if a.has_default_value() else None for a in schema
    }


def args_of(node: Node) -> tuple[Any, ...]:
    """The node's positional arguments, which FX types as anything under the sun."""
    return node.args


def is_call(node: Any, *targets: OpOverload) -> bool:
    """True for a node that calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def expression(size: Any) -> Any:
    """A size as an int or a sympy expression, so that equal sizes compare equal and no guard is made."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def value(node: Node) -> Any:
    """The FakeTensor that a node stands for; a node that this pass has made stands for what it replaced."""
    return node.meta["val"] if "val" in node.meta else node.meta["expected"]


def shape(node: Node) -> tuple[Any, ...]:
    """The shape of a node's value, comparable with ==."""
    return tuple(expression(size) for size in value(node).shape)


def same_type(a: Any, b: Any) -> bool:
    """True when two values (tensors or tuples of them) have equal shape and dtype."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and tuple(map(expression, a.shape)) == tuple(map(expression, b.shape))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_type(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (not isinstance(a, torch.SymInt) or expression(a) == expression(b))


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def fake_mode(program: Program) -> Any:
    """The FakeTensorMode of the graph's values."""
    for node in program.graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise InternalError("no node of the graph has a type")


def fake_like(program: Program, tensor: torch.Tensor) -> torch.Tensor:
    """The type of a stored tensor as a value of the graph, on the device of the graph's inputs."""
    first = next(iter(program.graph.graph.nodes)).meta.get("val")
    device = first.device if isinstance(first, torch.Tensor) else torch.device("cpu")
    with fake_mode(program):
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=device)


def _evaluate(program: Program, node: Node, mode: Any) -> Any:
    if node.op == "get_attr":
        return fake_like(program, program.tensors[node.meta["tensor"]])
    function: Any = getattr(program.graph, str(node.target)) if node.op == "call_module" else node.target
    args: Any = map_arg(node.args, lambda source: source.meta["val"])
    kwargs: Any = map_arg(node.kwargs, lambda source: source.meta["val"])
    # Some operators that torch makes of others ask for numbers, which fixes the sizes to those of the example, unless Python's
    # decompositions come first.
    with mode if mode is not None else nullcontext(), enable_python_dispatcher():
        return function(*args, **kwargs)


def infer(program: Program, nodes: Iterable[Node] | None = None) -> None:
    """Gives every new or changed node its `meta["val"]`; looks at `nodes` only, when they are given.

    InternalError when the arguments of a node do not fit, or a rewrite changed the type of a value that others read.
    """
    mode = fake_mode(program)
    for node in program.graph.graph.nodes if nodes is None else nodes:
        if node.op not in ("call_function", "call_module", "get_attr"):
            continue
        signature = (node.target, node.args, node.kwargs)
        known = node.meta.get("val")
        if known is not None and node.meta.setdefault("signature", signature) == signature:
            continue
        try:
            value = _evaluate(program, node, mode)
        except Exception as error:
            raise InternalError(
                f"the arguments of {operator_name(node)} do not fit",
                where=f"{node.meta.get('module', '')} ({node.format_node()})",
                found=f"{type(error).__name__}: {error}",
            ) from error
        expected = node.meta.pop("expected", known)
        if expected is not None and not same_type(value, expected):
            raise InternalError(
                "a rewrite changed the type of a value",
                where=f"{node.meta.get('module', '')} ({node.format_node()})",
                found=_describe(value),
                expected=_describe(expected),
            )
        node.meta["val"], node.meta["signature"] = value, signature


def substitute(old: Node, new: Node) -> None:
    """`new` takes the place of `old` everywhere; the next check makes sure that it has the same type."""
    if "val" not in new.meta:
        new.meta["expected"] = old.meta["val"] if "val" in old.meta else old.meta["expected"]
    elif not same_type(new.meta["val"], old.meta["val"]):
        raise InternalError(
            "a rewrite changed the type of a value",
            where=f"{old.meta.get('module', '')} ({old.name} -> {new.name})",
            found=_describe(new.meta["val"]),
            expected=_describe(old.meta["val"]),
        )
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def inherit(new: Node, old: Node, made_by: str) -> Node:
    """Gives `new` the module path and source line of `old`, and notes who made it."""
    for key in ("module", "stack_trace"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    new.meta["made_by"] = made_by
    return new


def call(before: Node, target: Any, args: Sequence[Any], made_by: str, like: Node | None = None) -> Node:
    """A new node in front of `before`, with the origin of `like` (of `before` itself by default)."""
    with before.graph.inserting_before(before):
        return inherit(before.graph.call_function(target, tuple(args)), like or before, made_by)


def set_tensor(program: Program, name: str, tensor: torch.Tensor) -> None:
    """Stores `tensor` as `name` and gives it to the graph's nodes that read `name`."""
    program.tensors[name] = tensor
    for node in program.graph.graph.nodes:
        if node.op == "get_attr" and node.meta.get("tensor") == name:
            program.graph.register_buffer(node.target, program.tensors[name])
            node.meta.pop("val", None)


def tensor_node(program: Program, name: str, tensor: torch.Tensor | None = None) -> Node:
    """The node that reads the stored tensor `name`, at the top of the graph; `tensor` is stored first when it is given."""
    if tensor is not None:
        program.tensors[name] = tensor
    graph = program.graph.graph
    first = None
    for node in graph.nodes:
        if node.op == "get_attr" and node.meta.get("tensor") == name:
            first = node
            break
    if first is None:
        top = next(node for node in graph.nodes if node.op != "placeholder")
        attribute = "".join(c if c.isalnum() else "_" for c in name)
        while hasattr(program.graph, attribute):
            attribute += "_"
        program.graph.register_buffer(attribute, program.tensors[name])
        with graph.inserting_before(top):
            first = graph.get_attr(attribute)
        first.meta |= {"tensor": name, "val": fake_like(program, program.tensors[name])}
    return first


def erase_unused(nodes: Sequence[Node]) -> None:
    """Erases each call whose value nobody uses, and then what only it used; stored tensors stay."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if not node._erased and node.op == "call_function" and not node.users and not node.is_impure():
            waiting += node.all_input_nodes
            node.graph.erase_node(node)


def forget(program: Program, nodes: Sequence[Node]) -> None:
    """Drops stored tensors that nobody reads any more, with their nodes, so that their memory is free at once.

    What a module's record still needs to give its weight stays.
    """
    named = {name for record in program.weights.values() for name in record.names()}
    for node in dict.fromkeys(nodes):
        if not node.users:
            if node.meta["tensor"] not in named:
                program.tensors.pop(node.meta["tensor"], None)
            program.graph.graph.erase_node(node)
            delattr(program.graph, str(node.target))


def unused_name(program: Program, name: str) -> str:
    """`name`, or `name` with a number when it is taken."""
    taken, made, count = program.tensors, name, 1
    while made in taken:
        count += 1
        made = f"{name}.{count}"
    return made
