"""What a lowering rule sees: the context that hands out views and buffers and collects calls, and the way to refuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import sympy
import torch
from torch.fx import Node

from qcompile.artifact import Buffer, BufferKind, Call, KernelSpec, Port, Step, Variant, View
from qcompile.dims import Dim, times
from qcompile.dtypes import NAMES
from qcompile.errors import InternalError
from qcompile.lowering.alignment import starts_aligned
from qcompile.lowering.symbolic import Size, Strided, dim, size
from qcompile.program import Program


class Refuse(Exception):
    """A rule cannot lower this node; the text is the reason and goes to the report."""


def operands(node: Node, **defaults: Any) -> list[Any]:
    """The arguments that the operator's schema requires, in order, then those that `defaults` names, in its order."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((item.name for item in schema), node.args, strict=False)) | dict(node.kwargs)
    required = [item.name for item in schema if not item.has_default_value() and item.name not in defaults]
    return [*(given[name] for name in required), *(given.get(name, value) for name, value in defaults.items())]


class Copier(Protocol):
    """Emits the call that copies (and converts) one strided view into another; each backend has one."""

    def __call__(self, ctx: Context, source: View, target: View, source_dtype: str, target_dtype: str, /) -> Call: ...


class Context:
    """The state of one lowering: what every node became, and the program built so far.

    Rules read `program`, `accuracy` and `target`, and call the methods below; they never touch the lists.
    """

    def __init__(self, program: Program, target: Any, accuracy: str, copier: Copier):
        self.program, self.target, self.accuracy, self._copier = program, target, accuracy, copier
        self.names: dict[sympy.Symbol, str] = {}
        self.values: dict[Node, Any] = {}
        self.buffers: dict[str, Buffer] = {}
        self.extents: dict[str, Size] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.kernels: dict[str, KernelSpec] = {}
        self.steps: list[Step] = []
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.node: Node | None = None
        self._count = 0

    # -- what a node is --

    def strided(self, node: Node) -> Strided:
        """The strided view that `node` became; InternalError for a node that is not one tensor."""
        value = self.values[node]
        if not isinstance(value, Strided):
            raise InternalError("a node is not a single tensor", where=str(node), found=type(value).__name__)
        return value

    def view(self, node: Node | Strided) -> View:
        """The view with its sizes as text. It may have gaps, and strides of 0."""
        return (node if isinstance(node, Strided) else self.strided(node)).to_view(self.names)

    def shape(self, node: Node) -> tuple[Dim, ...]:
        return tuple(self.dim(item) for item in node.meta["val"].shape)

    def dtype(self, node: Node) -> str:
        return NAMES[node.meta["val"].dtype]

    def dim(self, value: int | torch.SymInt | Size) -> Dim:
        """The text of a size; Refuse for forms that qcompile.dims has no grammar for."""
        try:
            return dim(size(value), self.names)
        except (KeyError, ValueError) as error:
            raise Refuse(f"a size has no static form: {error}") from None

    def serves(self, names: Sequence[str], kernel: str, tier: str, reason: str = "") -> None:
        """Notes what reads the weight stored as `names`: for the node's own module, and others it has nothing noted for."""
        own, report = self.node.meta.get("module", "") if self.node else "", self.program.report
        for path, record in self.program.weights.items():
            row = report.weights.get(path)
            if row is not None and [*record.tensors.values()] == list(names) and (path == own or not row.tier):
                report.update_weight(path, kernel=kernel, tier=tier, reason=reason)

    # -- where data lives --

    def fresh(self, hint: str) -> str:
        self._count += 1
        return f"{hint}.{self._count}"

    def _allocate(self, hint: str, dtype: str, shape: Sequence[Any]) -> Strided:
        strided = Strided.contiguous_in(self.fresh(hint), dtype, shape)
        self.buffers[strided.buffer] = Buffer(strided.buffer, dtype, tuple(self.dim(s) for s in strided.shape), "temp")
        self.extents[strided.buffer] = strided.numel
        return strided

    def output(self, node: Node, dtype: str | None = None) -> View:
        """Allocates the contiguous buffer that holds `node`'s value and returns it."""
        value = node.meta["val"]
        self.values[node] = self._allocate(node.name, dtype or NAMES[value.dtype], value.shape)
        return self.view(node)

    def output_in_order(self, node: Node, order: Sequence[int]) -> View:
        """Allocates `node`'s buffer with its dimensions in another order, and returns the contiguous view of it.

        `node`'s value becomes the view that puts them back: [B, H, S, D] computed as [B, S, H, D] is order (0, 2, 1, 3).
        """
        value = node.meta["val"]
        made = self._allocate(node.name, NAMES[value.dtype], [value.shape[axis] for axis in order])
        self.values[node] = made.permute([list(order).index(axis) for axis in range(len(order))])
        return self.view(made)

    def outputs_of(self, node: Node) -> list[View]:
        """Like `output`, for a node whose value is a tuple of tensors."""
        made = [self._allocate(node.name, NAMES[item.dtype], item.shape) for item in node.meta["val"]]
        self.values[node] = tuple(made)
        return [self.view(item) for item in made]

    def temp(self, shape: Sequence[Dim], dtype: str) -> View:
        """A contiguous scratch array of this step. The size name "threads" may be used in `shape`."""
        return self._scratch("temp", shape, dtype)

    def counters(self, shape: Sequence[Dim]) -> View:
        """A contiguous array of i32 zeros, which the kernel that is given it leaves as zeros."""
        return self._scratch("counter", shape, "i32")

    def _scratch(self, kind: BufferKind, shape: Sequence[Dim], dtype: str) -> View:
        name = self.fresh("scratch" if kind == "temp" else "counters")
        self.buffers[name] = Buffer(name, dtype, tuple(shape), kind)
        strides: list[Dim] = []
        step: Dim = 1
        for length in reversed(shape):
            strides.append(step)
            step = times(step, length)
        return View(name, tuple(shape), tuple(reversed(strides)))

    def constant(self, name: str, tensor: torch.Tensor) -> View:
        """A tensor that is stored with the weights under `name`."""
        if name not in self.buffers:
            tensor = tensor.detach().contiguous()
            self.buffers[name] = Buffer(name, NAMES[tensor.dtype], tuple(tensor.shape), "weight")
            self.weights[name] = tensor
        elif self.weights[name].shape != tensor.shape:
            raise InternalError("two different constants have one name", where=name)
        buffer = self.buffers[name]
        return self.view(Strided.contiguous_in(name, buffer.dtype, buffer.shape))

    def weight(self, name: str) -> View:
        """The tensor `name` of the program, stored with the weights."""
        return self.constant(name, self.program.tensors[name])

    # -- work --

    def contiguous(self, node: Node | Strided, dtype: str | None = None) -> View:
        """The value in row-major order without gaps and in `dtype`; emits a copy when it is not so already.

        For a GPU it also begins at a multiple of 16 bytes.
        """
        source = node if isinstance(node, Strided) else self.strided(node)
        if source.is_contiguous and dtype in (None, source.dtype):
            view = self.view(source)
            if self.target.backend != "cuda" or starts_aligned(view.offset, source.dtype):
                return view
        return self.view(self.copied(source, dtype))

    def as_float(self, node: Node) -> View:
        """The value in row-major order in f32: converted now where it is a stored tensor."""
        if node.op == "get_attr" and self.dtype(node) != "f32":
            name = node.meta["tensor"]
            return self.constant(f"{name}.f32", self.program.tensors[name].float())
        return self.contiguous(node, "f32")

    def copied(self, source: Strided, dtype: str | None = None) -> Strided:
        """A fresh contiguous copy of `source` in `dtype`."""
        target = self._allocate("copy", dtype or source.dtype, source.shape)
        self.emit(self.copy(source, target))
        return target

    def copy(self, source: Strided, target: Strided) -> Call:
        """The call that copies `source` into `target` (same shape), converting the dtype."""
        return self._copier(self, self.view(source), self.view(target), source.dtype, target.dtype)

    def kernel(self, template: str, params: dict[str, Any]) -> str:
        """The name of the kernel made by `template` from `params` (JSON); equal ones share a name."""
        text = json.dumps([template, params], sort_keys=True)
        name = f"{template}-{hashlib.sha256(text.encode()).hexdigest()[:12]}".replace("-", "_")
        self.kernels[name] = KernelSpec(template, json.loads(text)[1])
        return name

    def call(
        self, template: str, params: dict[str, Any], args: Sequence[View], dims: Sequence[Dim], writes: Sequence[int]
    ) -> Call:
        return Call(self.kernel(template, params), tuple(args), tuple(dims), tuple(writes))

    def emit(self, *calls: Call) -> None:
        """Adds a step that always runs `calls`, in order."""
        self.variants([(None, list(calls))])

    def variants(self, choices: Sequence[tuple[tuple[Dim, int] | None, Sequence[Call]]]) -> None:
        """Adds a step: the first choice whose (size, greatest value) holds is run."""
        made = tuple(Variant(when, tuple(calls)) for when, calls in choices)
        node = self.node
        self.steps.append(Step(node.name if node else "output", node.meta.get("module", "") if node else "", made))
