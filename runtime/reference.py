"""Runs a graph operation by operation through torch, on any of its devices, with the interface of a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qcompile import operators
from qcompile.artifact import Buffer, Graph, GraphNode, Port, View
from qcompile.dtypes import DTYPES
from qcompile.errors import ArtifactError, ConfigError
from qcompile.runtime.check import check_graph
from qcompile.runtime.inputs import LENGTH, Signature
from qcompile.runtime.runner import Runner
from qcompile.runtime.state import State


def _usable(device: str | torch.device) -> torch.device:
    """The torch device; ConfigError where torch has none of that name, or cannot use it on this machine."""
    try:
        made = torch.device(device)
        torch.empty(1, device=made)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "torch cannot use this device", where=f"target 'reference:{device}'", found=str(error).splitlines()[0],
            expected="a device of the installed torch and this machine", remedy="'reference' runs on the processor",
        ) from None  # fmt: skip
    return made


class ReferenceSession(Runner):
    """A graph in memory on a torch device, for any number of calls from any thread.

    `weights` are the tensors by name; `sizes` bounds the named sizes.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        device: str | torch.device = "cpu",
        *,
        sizes: Mapping[str, tuple[int, int]] | None = None,
    ):
        self.graph, self.device, self.states = graph, _usable(device), graph.states
        used = check_graph(graph)
        missing = sorted(used - weights.keys())
        if missing:
            raise ArtifactError("a weight is missing", where=missing[0])
        self.weights = {name: weights[name].to(self.device) for name in sorted(used)}
        self.signature = Signature(map(_port, graph.inputs), {b.name: b for b in graph.inputs}, dict(sizes or {}))
        self.functions: list[Callable[..., Any]] = [operators.reference(node.op) for node in graph.nodes]
        self.dead = _last_uses(graph)

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        state: State | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """As `Session.__call__`; `out` is not used."""
        accepted, sizes = self.signature.accept(inputs, state, bool(self.states))
        values: dict[str, Any] = {
            name: accepted[name].to(device=self.device, dtype=DTYPES[port.dtype])
            for name, port in self.signature.ports.items()
        }
        if state is not None:
            values.update(state.tensors)
        names: dict[str, Callable[[Any], Any]] = {
            "node": values.__getitem__,
            "tensor": self.weights.__getitem__,
            "dtype": operators.dtype,
            "float": operators.number,
            "device": lambda _: self.device,
            "memory_format": operators.MEMORY_FORMATS.__getitem__,
        }
        with torch.no_grad():
            for node, function, dead in zip(self.graph.nodes, self.functions, self.dead, strict=True):
                arguments = [operators.resolve(argument, names) for argument in node.args]
                keywords = {name: operators.resolve(argument, names) for name, argument in node.kwargs.items()}
                values[node.name] = self._run(node, function, arguments, keywords)
                for name in dead:
                    del values[name]
            results = {name: operators.resolve(value, names) for name, value in self.graph.outputs.items()}
        if state is not None:
            state.advance(sizes[LENGTH])
        # What is an input or weight as well must not be changed through the result.
        shared = {_memory(tensor) for tensor in (*accepted.values(), *self.weights.values())}
        return {name: result.clone() if _memory(result) in shared else result for name, result in results.items()}

    def _run(
        self, node: GraphNode, function: Callable[..., Any], arguments: list[Any], keywords: dict[str, Any]
    ) -> Any:
        try:
            return function(*arguments, **keywords)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            where = f"{node.module} ({node.name} = {node.op})"
            raise ArtifactError("an operation failed", where=where, found=str(error)[:400]) from error


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _port(buffer: Buffer) -> Port:
    return Port(buffer.name, View(buffer.name, buffer.shape, (0,) * len(buffer.shape)), buffer.dtype)


def _mentions(literal: Any) -> set[str]:
    if isinstance(literal, (list, tuple)):
        return set().union(*map(_mentions, literal))
    if isinstance(literal, dict):
        return {literal["node"]} if "node" in literal else _mentions(list(literal.values()))
    return set()


def _last_uses(graph: Graph) -> list[list[str]]:
    """For each node, the values that nobody needs after it."""
    kept = _mentions(graph.outputs)
    seen, dead = set(kept), []
    for node in reversed(graph.nodes):
        names = {node.name, *_mentions((node.args, node.kwargs))}
        dead.append(sorted(names - seen))
        seen |= names
    return dead[::-1]
