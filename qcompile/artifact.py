"""What a compiled model is, as data: buffers, views, calls, steps, kernels; and the folder that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qcompile.dims import Dim

if TYPE_CHECKING:
    import torch

BufferKind = Literal["input", "output", "weight", "state", "temp", "counter"]


@dataclass(frozen=True)
class Buffer:
    """A contiguous row-major array. `shape` may name sizes; `weight` buffers, which lie in the weights file, name none.

    `state` buffers outlive a call (the KV cache); `temp` buffers live between their first and last step. `counter`
    buffers are full of zeros whenever a kernel starts, and every kernel leaves them so: they may share their memory.
    `below`, for integers that a kernel uses as an index: every element of a weight or input is in 0 .. below - 1,
    checked when it is bound.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    kind: BufferKind
    below: Dim | None = None


@dataclass(frozen=True)
class View:
    """A strided window of a buffer; `offset` and `strides` count elements."""

    buffer: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = 0


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel computes, as data: enough for `qcompile.lowering` to generate its text again.

    `template` is one of a closed set of names; `params` is JSON.
    """

    template: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One kernel launch over all threads, or one ATen operator.

    A kernel is `void f(void **args, const int64_t *dims, int64_t thread, int64_t threads)`: `args[i]` points at the
    first element of view i, `dims` are the evaluated `dims`. It splits its own work over the threads and returns when
    its share is done; the executor puts a barrier behind every call.
    An eager operator (`kernel` is "aten.<name>.<overload>" or "qcompile.<name>.default") takes `literals`: a list of
    arguments and an object of keyword arguments, JSON in which {"view": i} stands for args[i], {"dim": d} for a
    dimension and {"dtype": name} for a dtype; its results are copied to the views listed in `writes`, in order.
    """

    kernel: str
    args: tuple[View, ...]
    dims: tuple[Dim, ...] = ()
    writes: tuple[int, ...] = ()
    literals: tuple[Any, ...] | None = None


class Extent(NamedTuple):
    """What a kernel may touch of one argument: `elements` of `dtype` from its first on; `written`: it writes there."""

    dtype: str
    elements: int
    written: bool = False


Extents = Callable[[tuple[int, ...], int], Sequence[Extent]]
"""(dims of a call, threads) -> the extent of each argument; ArtifactError for dims that the kernel is not made for."""


@dataclass(frozen=True)
class Variant:
    """Calls to use while `when[0] <= when[1]` (always, when it is None)."""

    when: tuple[Dim, int] | None
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Step:
    """One operation of the lowered program: the first variant whose condition holds is run."""

    name: str
    module: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Port:
    """An input or output of the program: the name the caller uses, where it lies, and the dtype the caller sees."""

    name: str
    view: View
    dtype: str


@dataclass(frozen=True)
class Executable:
    """A lowered program: buffers, steps and kernels, for one target.

    Sizes are named by the shapes of inputs and states; the name `threads` is the number of threads that run it.
    """

    buffers: dict[str, Buffer]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    kernels: dict[str, KernelSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphNode:
    """One operation of a graph: `op` is an eager operator or one of the small arithmetic ones ("sym.add", "getitem").

    In `args` and `kwargs` (JSON), {"node": name} is another node's value, {"tensor": name} a weight, {"dtype": name} a
    dtype, {"device": "run"} the device it runs on.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    module: str = ""


@dataclass(frozen=True)
class Graph:
    """A whole program as eager operations in order, for any torch device; `outputs` maps names to literals."""

    inputs: tuple[Buffer, ...]
    states: tuple[Buffer, ...]
    nodes: tuple[GraphNode, ...]
    outputs: dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """How a GPU kernel is started, and what it takes of the machine.

    `grid` counts programs along three axes, in terms of the call's dims as d0, d1 ...; each is `warps` x 32 threads with
    `shared` bytes of shared memory. The kernel takes a pointer for each argument, an i32 for each dim, and `scratch` null
    pointers. `registers` of a thread, `spills` bytes of a thread that lie in memory instead, `stages` of the loads ahead of
    their use, `loop` instructions of a thread in the loop that does most `products` on tensor cores: for the report.
    """

    grid: tuple[Dim, Dim, Dim]
    warps: int
    shared: int = 0
    scratch: int = 0
    stages: int = 0
    registers: int = 0
    spills: int = 0
    loop: int = 0
    products: float = 0.0


@dataclass(frozen=True)
class Built:
    """A kernel made from its spec: the text to read, the object, and the name of the function in it.

    The object is relocatable code for a CPU; a cubin, or PTX text, for a GPU, which `launch` says how to start.
    """

    source: str
    object: bytes
    entry: str
    launch: Launch | None = None


@dataclass(frozen=True)
class TransformRecord:
    """A transform (its JSON) and where its stored tensors lie (stored name -> name of a tensor)."""

    transform: dict[str, Any]
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """A module of the source model that holds a weight.

    `kind` is "Linear", "Conv1D" (weight [K, N]) or "Embedding"; `n` outputs (rows of an embedding), `k` inputs.
    `weight` and `bias` are tensor names in the source (bias is None where there is none).
    `tied` names other modules that share the weight. `output_embedding` is true for a language model's head.
    `last_parameter` is true when the weight is the last of the model's named parameters, and `keep_f32` when the
    architecture asks for float32 here (transformers' `_keep_in_fp32_modules`): methods skip both by default.
    "Experts" are `experts` weights [N, K] of a mixture, one tensor [E, N, K] ([E, K, N] if `transposed`) of which `path` is
    the name; `n` and `k` are those of one. `parts` are the paths of the layers in the source that make it up, those of the
    first expert first, where the source has them quantized one by one.
    "Convolution" is one that is computed as a linear map of windows: its weight [N, C, *window] as a matrix [N, K] with the
    channels innermost in K.
    """

    path: str
    kind: Literal["Linear", "Conv1D", "Embedding", "Experts", "Convolution"]
    n: int
    k: int
    weight: str
    bias: str | None = None
    dtype: str = "f32"
    tied: tuple[str, ...] = ()
    output_embedding: bool = False
    last_parameter: bool = False
    keep_f32: bool = False
    experts: int = 0
    transposed: bool = False
    parts: tuple[str, ...] = ()
    window: tuple[int, ...] = ()

    def unflattened(self, weight: torch.Tensor) -> torch.Tensor:
        """A convolution's weight [N, C, *window] from its matrix [N, K]."""
        return weight.reshape(self.n, *self.window, -1).movedim(-1, 1)


@dataclass(frozen=True)
class Origin:
    """What a module's weight was when its method had packed it, for writing a checkpoint again.

    `format` (its JSON) is what the method packed it in; `quantized` is false where the method left it dense. `kept` are
    the tensors of that format (stored name -> name of a tensor) that the layout used now does not say. `after` happens to
    y behind the matmul, and `bias` names the tensor that stands for the module's own.
    """

    module: Module
    format: dict[str, Any]
    quantized: bool = True
    kept: dict[str, str] = field(default_factory=dict)
    after: tuple[TransformRecord, ...] = ()
    bias: str | None = None

    def names(self) -> set[str]:
        """Every tensor that the origin names."""
        bias = {self.bias} if self.bias is not None else set()
        return {*self.kept.values(), *(name for each in self.after for name in each.tensors.values())} | bias


@dataclass(frozen=True)
class WeightRecord:
    """Where the weight of a module lies now, and the way back to its value.

    The packed weight [n, k] in `format` (its JSON) is held by `tensors` (stored name -> name of a tensor); the module's
    own weight is its `rows` rows from `row` on. `order`, if any, names the i64 [k] tensor that says which input of the
    module each packed column is: module_weight[:, order[i]] = packed[:, i]. `before` is what happens to x, in order,
    before it meets that weight, and `residual` the part of the weight that the format does not hold. `origin` says what
    the layout was made from.
    """

    format: dict[str, Any]
    tensors: dict[str, str]
    n: int
    k: int
    row: int
    rows: int
    order: str | None = None
    before: tuple[TransformRecord, ...] = ()
    residual: TransformRecord | None = None
    origin: Origin | None = None

    def names(self) -> set[str]:
        """Every tensor that the record names."""
        around = (*self.before, *([self.residual] if self.residual is not None else []))
        order = {self.order} if self.order is not None else set()
        origin = set() if self.origin is None else self.origin.names()
        return {*self.tensors.values(), *(name for each in around for name in each.tensors.values())} | order | origin


@dataclass(frozen=True)
class Mixture:
    """Where the weight of `experts` experts lies: the paths of the records that make it up, one below the other."""

    experts: int
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """A tensor of the source that is no module's weight: the tensor that holds it now, and the dtype it had."""

    tensor: str
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """What else a compiled model remembers of its source: `parameters` by name, and generation_config.json."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A compiled model as data, without its tensors, kernels and report.

    `sizes` bounds each named size (least, greatest). `structure` says what a call returns: {"output": name} is a
    tensor, {"tuple" | "list": [...]}, {"dict" | "fields": {...}} hold more of the same; None stands for the one output,
    or a tuple of them. `model_config` and `quantization_config` are as in a model's config.json, for information;
    `generation` holds defaults of generate(); `defaults` the number that fills an input which the caller leaves out.
    `mixtures` are the weights of mixtures of experts by the path of the tensor that holds all of them in the source model.
    `checkpoint` and each weight's origin are what a checkpoint is written from.
    """

    target: str
    kind: Literal["causal-lm", "module"]
    accuracy: str = "exact"
    executable: Executable | None = None
    graph: Graph | None = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: dict[str, WeightRecord] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    structure: Any = None
    model_config: dict[str, Any] = field(default_factory=dict)
    quantization_config: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, int | float] = field(default_factory=dict)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
