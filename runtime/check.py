"""Whether an artifact's data hold together: every name resolves, every dimension parses, nothing is left over."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from qcompile import dims, operators
from qcompile.artifact import Artifact, Buffer, Call, Executable, Graph, Launch, Port, View, WeightRecord
from qcompile.dims import Dim
from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import ArtifactError, QCompileError, near
from qcompile.runtime.inputs import check_indices

MAX_STEPS, MAX_RANK, MAX_DEPTH = 1_000_000, 16, 32
KERNEL_NAME = re.compile(r"[a-z0-9_-]{1,128}")
MAX_SCRATCH = 8  # null pointers behind the arguments of a GPU kernel
NUMBER = re.compile(r"d[0-9]{1,3}")


class _Dims:
    """Checks the text of dimensions; each once."""

    def __init__(self, known: Iterable[str]):
        self.known, self.seen = set(known), set[str]()

    def __call__(self, where: str, *texts: Dim) -> None:
        for text in texts:
            if isinstance(text, int) or text in self.seen:
                continue
            unknown = sorted(dims.names(text) - self.known)
            if unknown:
                hint = ", ".join(sorted(self.known)) + near(unknown[0], self.known)
                raise ArtifactError("a size is not known", where=where, found=unknown[0], expected=hint)
            self.seen.add(text)


def _fail(summary: str, where: str, found: object = "", expected: object = "") -> ArtifactError:
    return ArtifactError(summary, where=where[:200], found=str(found)[:200], expected=expected)


def _buffers(buffers: Iterable[tuple[str, Buffer]]) -> None:
    for name, buffer in buffers:
        if buffer.name != name:
            raise _fail("a buffer has two names", name, buffer.name)
        if buffer.dtype not in DTYPES:
            raise _fail("a dtype is not known", name, buffer.dtype, ", ".join(DTYPES))
        if len(buffer.shape) > MAX_RANK:
            raise _fail("an array has too many dimensions", name, len(buffer.shape), f"at most {MAX_RANK}")


def sizes_of(buffers: Iterable[Buffer]) -> set[str]:
    """The sizes that the shapes of inputs and states name."""
    return {
        dim
        for b in buffers
        if b.kind in ("input", "state")
        for dim in b.shape
        if isinstance(dim, str) and dim.isidentifier()
    }


def check_executable(program: Executable) -> None:
    """ArtifactError unless every view, kernel and size that the program mentions exists."""
    _buffers(program.buffers.items())
    known = _Dims(sizes_of(program.buffers.values()) | {"threads"})
    for name, buffer in program.buffers.items():
        known(name, *buffer.shape, *([] if buffer.below is None else [buffer.below]))
        if buffer.kind == "weight" and not all(isinstance(dim, int) and dim >= 0 for dim in buffer.shape):
            raise _fail("a weight's shape is not fixed", name, buffer.shape)
    _ports(program, program.inputs, "input", known)
    _ports(program, program.outputs, None, known)
    for name, spec in program.kernels.items():
        if not KERNEL_NAME.fullmatch(name) or not KERNEL_NAME.fullmatch(spec.template):
            raise _fail("a kernel's name is not allowed", repr(name), repr(spec.template), KERNEL_NAME.pattern)
    if len(program.steps) > MAX_STEPS:
        raise _fail("the program is too long", "steps", len(program.steps), f"at most {MAX_STEPS}")
    for step in program.steps:
        for variant in step.variants:
            known(step.name, *([] if variant.when is None else [variant.when[0]]))
            for call in variant.calls:
                _call(program, step.name, call, known)


def check_launches(entries: Iterable[str], launches: Mapping[str, Launch], gpu: bool) -> None:
    """ArtifactError unless the kernels in `entries` can be started as `launches` says: all of them for a GPU, else none."""
    for name in sorted(launches.keys() ^ (set(entries) if gpu else set())):
        raise _fail("a kernel's launch is missing, or belongs to nothing", name)
    for name, launch in launches.items():
        counted = (launch.shared, launch.scratch, launch.stages, launch.registers, launch.spills)
        numbers = (*counted, launch.loop, launch.products)
        sound = 1 <= launch.warps <= 32 and launch.scratch <= MAX_SCRATCH and min(numbers) >= 0
        if not sound or not all(NUMBER.fullmatch(used) for dim in launch.grid for used in dims.names(dim)):
            raise _fail("a kernel cannot be started so", name, launch)


def _ports(program: Executable, ports: tuple[Port, ...], kind: str | None, known: _Dims) -> None:
    names = [port.name for port in ports]
    for port in ports:
        _view(program, port.name, port.view, known)
        if names.count(port.name) > 1:
            raise _fail("two ports have one name", port.name)
        if port.dtype not in DTYPES:
            raise _fail("a dtype is not known", port.name, port.dtype, ", ".join(DTYPES))
        buffer = program.buffers[port.view.buffer]
        if kind is not None and buffer.kind != kind:
            raise _fail(f"an {kind} is in another kind of buffer", port.name, buffer.kind, kind)
        # What the caller gives is checked against the port, and lies where the buffer is.
        if kind is not None and port.view.shape != buffer.shape:
            raise _fail(f"an {kind} is not all of its buffer", port.name, port.view.shape, buffer.shape)


def _view(program: Executable, where: str, view: View, known: _Dims) -> None:
    if view.buffer not in program.buffers:
        raise _fail(
            "a buffer is not known",
            where,
            repr(view.buffer),
            "a buffer of the program" + near(view.buffer, program.buffers),
        )
    if len(view.shape) != len(view.strides) or len(view.shape) > MAX_RANK:
        raise _fail("a view's shape and strides do not match", where, f"{len(view.shape)} and {len(view.strides)}")
    known(where, *view.shape, *view.strides, view.offset)


def _call(program: Executable, where: str, call: Call, known: _Dims) -> None:
    for view in call.args:
        _view(program, where, view, known)
    known(where, *call.dims)
    for index in call.writes:
        if not 0 <= index < len(call.args):
            raise _fail("a call writes no argument of its own", where, index, f"0 to {len(call.args) - 1}")
        if program.buffers[call.args[index].buffer].kind in ("input", "weight"):
            raise _fail("a call writes an input or weight", where, call.args[index].buffer)
    if call.kernel in program.kernels:
        return
    operators.eager(call.kernel)
    if call.literals is None or list(map(type, call.literals)) != [list, dict]:
        raise _fail("an operator's arguments are not known", where, repr(call.literals), "a list and an object")
    for key, value in _leaves(list(call.literals), where):
        if key == "view" and not (type(value) is int and 0 <= value < len(call.args)):
            raise _fail("an operator's argument is out of range", where, repr(value), f"0 to {len(call.args) - 1}")
        if key == "dim":
            if type(value) not in (int, str):
                raise _fail("a dimension is not known", where, repr(value), "an integer or a text")
            known(where, value)
        if key not in ("view", "dim", "dtype", "float"):
            raise _fail("an operator's argument is not known", where, repr(key), "view | dim | dtype | float")


def _leaves(literal: Any, where: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The (key, value) of each {"key": value} in a literal; keyword arguments are on the second level."""
    if depth > MAX_DEPTH:
        raise _fail("an operator's arguments are nested too deep", where, expected=f"at most {MAX_DEPTH} levels")
    if isinstance(literal, (list, tuple)):
        for at, item in enumerate(literal):
            if depth == 0 and at == 1 and isinstance(item, dict):
                for value in item.values():
                    yield from _leaves(value, where, depth + 1)
            else:
                yield from _leaves(item, where, depth + 1)
    elif isinstance(literal, dict):
        if len(literal) != 1:
            raise _fail("an operator's argument is not known", where, repr(literal), "an object with one key")
        yield from literal.items()


def check_graph(graph: Graph) -> set[str]:
    """ArtifactError unless every value is made before it is used, by an operator of the table; the tensors it uses."""
    _buffers((buffer.name, buffer) for buffer in (*graph.inputs, *graph.states))
    known = _Dims(sizes_of((*graph.inputs, *graph.states)))
    made = {buffer.name for buffer in (*graph.inputs, *graph.states)}
    tensors: set[str] = set()
    for buffer in (*graph.inputs, *graph.states):
        known(buffer.name, *buffer.shape)
    if len(graph.nodes) > MAX_STEPS:
        raise _fail("the program is too long", "nodes", len(graph.nodes), f"at most {MAX_STEPS}")

    def use(where: str, literals: list[Any]) -> None:
        for key, value in _leaves(literals, where):
            if key == "node" and not (type(value) is str and value in made):
                raise _fail("a value is used before it is made", where, repr(value))
            if key == "tensor":
                if type(value) is not str:
                    raise _fail("a tensor's name is not a text", where, repr(value))
                tensors.add(value)
            known_value = {"device": ["run"], "memory_format": list(operators.MEMORY_FORMATS)}.get(key, [value])
            if key not in ("node", "tensor", "dtype", "device", "float", "memory_format") or value not in known_value:
                raise _fail("an operator's argument is not known", where, repr({key: value}))

    for node in graph.nodes:
        if node.name in made:
            raise _fail("two values have one name", node.name)
        operators.reference(node.op)
        use(node.name, [list(node.args), node.kwargs])
        made.add(node.name)
    use("outputs", [list(graph.outputs.values())])
    return tensors


def _structure(structure: Any, outputs: set[str], depth: int = 0) -> None:
    where = "structure"
    if structure is None:
        return
    if type(structure) is not dict or len(structure) != 1 or depth > MAX_DEPTH:
        raise _fail("the structure of the outputs is not known", where, repr(structure))
    ((kind, value),) = structure.items()
    if kind == "output" and type(value) is str and value in outputs:
        return
    if kind in ("tuple", "list") and type(value) is list:
        parts = value
    elif kind in ("dict", "fields") and type(value) is dict:
        parts = list(value.values())
    elif kind == "none":
        return
    else:
        raise _fail("the structure of the outputs is not known", where, repr(structure))
    for part in parts:
        _structure(part, outputs, depth + 1)


def _record(path: str, record: WeightRecord, tensors: Mapping[str, torch.Tensor]) -> None:
    """The tensors of a weight are those of its format, and its rows and order lie inside it."""
    from qcompile.format import Packed, format_from_json
    from qcompile.transform import Applied, transform_from_json

    try:
        held = {stored: tensors[name] for stored, name in record.tensors.items()}
        Packed(format_from_json(record.format), held, record.n, record.k).check(path)
        for transform in (*record.before, *([] if record.residual is None else [record.residual])):
            held = {stored: tensors[name] for stored, name in transform.tensors.items()}
            Applied(transform_from_json(transform.transform), held).check(record.k, path)
        if record.order is not None:
            check_indices(record.order, tensors[record.order], record.k)
    except (QCompileError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _fail("a weight's tensors are not those of its format", path, error, record.format) from error
    module = None if record.origin is None else record.origin.module
    if module is not None and module.window:
        fits = min(module.window) >= 1 and module.n == record.rows and record.k % math.prod(module.window) == 0
        if not fits:
            raise _fail("a convolution's window does not fit its weight", path, module.window)
    if record.row < 0 or record.rows < 0 or record.row + record.rows > record.n:
        raise _fail("a weight's rows lie outside it", path, f"{record.rows} from {record.row}", f"inside {record.n}")
    if record.order is not None and tuple(tensors[record.order].shape) != (record.k,):
        raise _fail("a weight's order has the wrong shape", path, list(tensors[record.order].shape), [record.k])


def check_artifact(artifact: Artifact, tensors: Mapping[str, torch.Tensor]) -> None:
    """ArtifactError unless the artifact's parts fit each other and use all of `tensors`, and only those."""
    used: set[str] = set()
    outputs: set[str] = set()
    if artifact.executable is None and artifact.graph is None:
        raise _fail("the artifact has neither steps nor a graph", "program.json")
    if artifact.executable is not None:
        check_executable(artifact.executable)
        outputs |= {port.name for port in artifact.executable.outputs}
        for name, buffer in artifact.executable.buffers.items():
            if buffer.kind == "weight":
                used.add(name)
                if name in tensors and (NAMES[tensors[name].dtype], tuple(tensors[name].shape)) != (
                    buffer.dtype,
                    buffer.shape,
                ):
                    found = f"{NAMES[tensors[name].dtype]} {list(tensors[name].shape)}"
                    raise _fail(
                        "a weight is not what the program expects", name, found, f"{buffer.dtype} {list(buffer.shape)}"
                    )
    if artifact.graph is not None:
        used |= check_graph(artifact.graph)
        outputs |= set(artifact.graph.outputs)
    for record in artifact.weights.values():
        used |= record.names()
    used |= {parameter.tensor for parameter in artifact.checkpoint.parameters.values()}
    for name in sorted(used - tensors.keys()):
        raise _fail("a weight is missing", name, "nothing", "a tensor of the weights file")
    for name in sorted(tensors.keys() - used):
        raise _fail("a weight is not used", name, expected="tensors that the program or a module names")
    for path, record in artifact.weights.items():
        _record(path, record, tensors)
    for path, mixture in artifact.mixtures.items():
        rows = [artifact.weights[part].rows for part in mixture.parts if part in artifact.weights]
        if len(rows) != len(mixture.parts) or mixture.experts < 1 or not rows or sum(rows) % mixture.experts:
            raise _fail(
                "the parts of a mixture of experts are not sound", path, rows, f"those of {mixture.experts} experts"
            )
    for name, (least, most) in artifact.sizes.items():
        if not 0 <= least <= most:
            raise _fail("the bounds of a size are not sound", name, (least, most))
    _structure(artifact.structure, outputs)
