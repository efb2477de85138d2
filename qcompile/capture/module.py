"""Capture of any nn.Module: a copy without weights is exported; what becomes of the graph, its inputs, outputs and tensors."""

from __future__ import annotations

import copy
import gc
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import sympy
import torch
from torch import nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from qcompile import ops  # noqa: F401  (the operators must exist before a graph can hold them)
from qcompile.capture.experts import expert_modules
from qcompile.capture.flatten import flatten
from qcompile.dims import Dim
from qcompile.dtypes import NAMES
from qcompile.errors import CaptureError, QCompileError
from qcompile.ledger import Ledger
from qcompile.methods.skip import matches
from qcompile.program import Input, Module, Program
from qcompile.report import Report
from qcompile.sources import ModuleState, TensorSource, dtype_name

MOST = 2**31 - 1


def _graph_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def hollow(model: nn.Module) -> nn.Module:
    """A copy of `model` in float32 whose parameters and persistent buffers have shapes but no memory.

    Buffers that are not stored in checkpoints keep their values. The model itself is not changed.
    """
    stored = model.state_dict(keep_vars=True)
    memo: dict[int, Any] = {}
    for tensor in model.buffers():
        memo[id(tensor)] = tensor.detach().to("cpu", _graph_dtype(tensor), copy=True)
    for tensor in [*model.parameters(), *stored.values()]:
        shell = torch.empty(tensor.shape, dtype=_graph_dtype(tensor))
        shell.untyped_storage().resize_(0)
        memo[id(tensor)] = nn.Parameter(shell, requires_grad=False) if isinstance(tensor, nn.Parameter) else shell
    return copy.deepcopy(model, memo).eval()


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _kind(module: nn.Module) -> Literal["Linear", "Conv1D", "Embedding"] | None:
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Embedding):
        return "Embedding"
    return "Conv1D" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def weight_modules(model: nn.Module, source: TensorSource, head: nn.Module | None = None) -> dict[str, Module]:
    """The modules of `model` that hold a weight, by path; `head` is a language model's output embedding."""
    first = aliases(model)
    found: dict[str, tuple[Any, str]] = {}
    for path, module in model.named_modules():
        if _kind(module) is not None:
            found[path] = (module, first[f"{path}.weight" if path else "weight"])
    there, modules = source.names(), {}
    last = next((name for name, _ in reversed(list(model.named_parameters()))), "")
    exact = getattr(model, "_keep_in_fp32_modules", None) or ()
    for path, (module, weight) in found.items():
        kind = _kind(module)
        assert kind is not None
        rows, columns = module.weight.shape
        n, k = (columns, rows) if kind == "Conv1D" else (rows, columns)
        bias = f"{path}.bias".lstrip(".") if getattr(module, "bias", None) is not None else None
        info = source.info(weight) if weight in there else None
        dtype = info.dtype if info is not None and not info.encoding else "f32"  # blocks are worth float32 numbers
        tied = tuple(other for other, (_, name) in found.items() if name == weight and other != path)
        modules[path] = Module(
            path, kind, n, k, weight, bias and first[bias], dtype, tied, module is head,
            last_parameter=weight == last, keep_f32=any(matches(pattern, path) for pattern in exact),
        )  # fmt: skip
    return modules | expert_modules(model, source)


def _owner(frame_locals: Mapping[str, Any], paths: Mapping[int, str]) -> str | None:
    return paths.get(id(frame_locals.get("self")))


def _place(error: BaseException, model: nn.Module) -> str:
    """The innermost module and the innermost source line outside of torch that an exception went through."""
    paths = {id(module): path for path, module in model.named_modules()}
    module, line, step = "", "", error.__traceback__
    while isinstance(step, TracebackType):
        frame = step.tb_frame
        module = _owner(frame.f_locals, paths) or module
        file = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in file and file != __file__ and not file.startswith("<"):
            line = f"{file}:{step.tb_lineno} in {frame.f_code.co_name}"
        step = step.tb_next
    return ", ".join(part for part in (module, line) if part) or type(model).__name__


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # Tracing makes millions of objects that stay alive; searching them for garbage takes a quarter of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """torch.export without strict tracing and without autograd; CaptureError says where and why it fails."""
    try:
        # Modules that the exporter makes on its way never run: it need not compile the code of each.
        with torch.no_grad(), _no_garbage_collection(), _use_lazy_graph_module(True):
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except QCompileError:
        raise
    except Exception as error:
        lines = [line for line in traceback.format_exception_only(error) if line.strip()]
        cause = " ".join(" ".join(lines).split())
        raise CaptureError(
            f"{type(model).__name__} cannot be exported to a graph",
            where=_place(error, model),
            found=cause[:600],
            expected="a forward whose control flow depends on shapes and settings only, not on the values of tensors",
            remedy="rewrite that line with tensor operators, or make the dimension it names fixed in dynamic_shapes",
        ) from error


def output_names(spec: Any) -> tuple[str, ...]:
    """Names of a model's outputs: keys where it returns a mapping, "output" or "output_0", ... otherwise."""
    if spec.is_leaf():
        return ("output",)
    keys = spec.context if spec.type is dict else getattr(spec.type, "__mro__", ()) and _keys(spec)
    if keys and all(child.is_leaf() for child in spec.children()):
        return tuple(keys)
    return tuple(f"output_{i}" for i in range(spec.num_leaves)) if spec.num_leaves != 1 else ("output",)


def _keys(spec: Any) -> list[str]:
    context = spec.context[0] if isinstance(spec.context, tuple) and spec.context else spec.context
    return list(context) if isinstance(context, list) and all(isinstance(key, str) for key in context) else []


def _size_names(dims: Sequence[Any], named: Mapping[str, Any]) -> dict[sympy.Symbol, str]:
    """Symbol -> the name of its Dim; `dims` are (input, axis, Dim), `named` the inputs' FakeTensors."""
    names: dict[sympy.Symbol, str] = {}
    for name, axis, dim in dims:
        size = named[name].shape[axis]
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            names.setdefault(size.node.expr, getattr(dim, "__name__", f"{name}_{axis}"))
    return names


def _dims(names: Sequence[str], shapes: Any) -> list[tuple[str, int, Any]]:
    if shapes is None:
        return []
    specs = shapes if isinstance(shapes, Mapping) else dict(zip(names, shapes, strict=False))
    return [item for name, spec in specs.items() for item in _axes(name, spec)]


def _axes(name: str, spec: Any) -> Iterator[tuple[str, int, Any]]:
    """The (input, axis, Dim) of one argument; what is in a tuple or dict is an input called `name`_<place>."""
    for key, value in spec.items() if isinstance(spec, Mapping) else enumerate(spec or ()):
        if isinstance(value, Mapping | list | tuple):
            yield from _axes(f"{name}_{key}", value)
        elif value is not None and not isinstance(value, int):
            yield name, key, value


def make_program(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    source: TensorSource,
    *,
    dynamic_shapes: Any,
    kind: Literal["causal-lm", "module"] = "module",
    prefix: str = "",
    outputs: tuple[str, ...] | None = None,
    head: nn.Module | None = None,
    model_config: dict[str, Any] | None = None,
    quantization_config: dict[str, Any] | None = None,
) -> Program:
    """The Program of an exported hollow `model`; `prefix` is what an export wrapper puts before its module paths.

    Tensors of the source that the graph does not use are put down in the ledger as ignored, with the reason.
    """
    first = aliases(model)
    kept = {first[name] for name in model.state_dict(keep_vars=True) if name in first}
    ledger, report = Ledger(source), Report()

    def name_of(target: str) -> str:
        name = target.removeprefix(prefix)
        return first.get(name, f"constant.{name}")

    def value_of(target: str, fake: torch.Tensor) -> torch.Tensor:
        if name_of(target) in kept:
            return torch.empty(tuple(fake.shape), dtype=fake.dtype, device="meta")
        held = exported.constants.get(target)
        return held if held is not None else model.get_buffer(target.removeprefix(prefix))

    flat = flatten(exported, name_of, value_of, prefix)
    # Nodes may be called otherwise: a graph's "input" is "input_1".
    values = (node.meta["val"] for node in flat.graph.graph.nodes if node.op == "placeholder")
    fakes = dict(zip(flat.inputs, values, strict=True))
    symbols = _size_names(_dims(flat.inputs, dynamic_shapes), fakes)
    program = Program(
        graph=flat.graph,
        kind=kind,
        modules=weight_modules(model, source, head),
        inputs=tuple(_input(name, fakes[name], symbols) for name in flat.inputs),
        outputs=outputs or output_names(exported.call_spec.out_spec),
        sizes={name: _range(exported, symbol) for symbol, name in symbols.items()},
        tensors=flat.tensors,
        source=source,
        ledger=ledger,
        report=report,
        model_config=model_config or {},
        quantization_config=quantization_config,
    )
    for name in source.names():
        if first.get(name, name) != name:
            ledger.ignore(name, f"the same tensor as {first[name]}")
        elif name in first and name not in kept:
            ledger.ignore(name, "the architecture computes it")
        elif name in first and name not in flat.tensors:
            ledger.ignore(name, "the graph does not use it")
    return program


def _input(name: str, fake: Any, symbols: Mapping[sympy.Symbol, str]) -> Input:
    if not isinstance(fake, torch.Tensor) or fake.dtype not in NAMES:
        found = dtype_name(fake.dtype) if isinstance(fake, torch.Tensor) else type(fake).__name__
        raise CaptureError(
            "an input is not a tensor of a known dtype", where=name, found=found, expected=", ".join(NAMES.values())
        )
    texts = {symbol: sympy.Symbol(text) for symbol, text in symbols.items()}

    def dim(size: int | torch.SymInt) -> Dim:
        return str(size.node.expr.xreplace(texts)) if isinstance(size, torch.SymInt) else int(size)

    return Input(name, NAMES[fake.dtype], tuple(dim(size) for size in fake.shape))


def _range(exported: torch.export.ExportedProgram, symbol: sympy.Symbol) -> tuple[int, int]:
    bounds = exported.range_constraints[symbol]
    return max(1, int(bounds.lower)), int(bounds.upper) if bounds.upper < MOST else MOST


def capture_module(model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any], dynamic_shapes: Any) -> Program:
    """The Program of any module, from example inputs; floating inputs may have any dtype and are used as float32."""
    return from_examples(hollow_or_error(model), ModuleState(model), example_inputs, dynamic_shapes)


def from_examples(
    shell: nn.Module,
    source: TensorSource,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: Any,
    model_config: dict[str, Any] | None = None,
) -> Program:
    """The Program of a hollow module called with `example_inputs`."""
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, _example, example_inputs)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), None)
    exported = export(shell, args, kwargs, dynamic_shapes)
    return make_program(shell, exported, source, dynamic_shapes=dynamic_shapes, model_config=model_config)


def hollow_or_error(model: nn.Module) -> nn.Module:
    try:
        return hollow(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied",
            where=_place(error, model),
            found=f"{type(error).__name__}: {error}"[:600],
            expected="a module that copy.deepcopy can copy",
            remedy="remove locks, open files and the like from the module's attributes",
        ) from error


def _example(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", _graph_dtype(tensor))
