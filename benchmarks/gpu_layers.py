"""One packed linear layer on a GPU: checked against float64, and timed cold against others.

A timing records one graph with as many copies of the layer as make 256 MB of weights, so that each comes from memory, and
replays it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_results import reason
from benchmarks.gpu_rivals import CUBLAS, Rival
from benchmarks.gpu_weights import Kind, Weights, compiled
from qcompile.runtime.codes import code_here, one_code
from qcompile.runtime.cuda import Device
from qcompile.runtime.cuda_session import CudaSession
from qcompile.runtime.model import CompiledModel
from qcompile.runtime.timing import copies, seconds

SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336))
ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 2048)
CHECKED = (1, 3, 4, 5, 16, 17, 32, 33, 100, 128, 129, 300)
BOUND = 6e-3
"""Greatest |y - exact| / |exact|: weights rounded once to bf16 are within 2^-9 of theirs, sums of them far closer."""

Opened = Callable[[CompiledModel], CudaSession]


def opened(device: Device) -> Opened:
    """What gives a compiled model a session of its own on `device`."""

    def session(model: CompiledModel) -> CudaSession:
        executable, contents = model.artifact.executable, model.contents
        assert executable is not None
        kernels = one_code(contents.kernels, executable.kernels, code_here(model.target))
        return CudaSession(
            executable, contents.tensors, kernels, device, sizes=model.artifact.sizes, bounds=model.bounds
        )

    return session


@dataclass(frozen=True)
class Checked:
    """How far a layer is from float64 for M rows, and whether it gave the same bits twice."""

    kind: str
    n: int
    k: int
    m: int
    error: float
    repeats: bool

    @property
    def ok(self) -> bool:
        return self.error < BOUND and self.repeats


def rows_of(m: int, k: int, device: torch.device, seed: int) -> torch.Tensor:
    """Random x f32 [m, k] of numbers that bf16 holds, so that rounding it changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator).bfloat16().float().to(device)


def distance(y: torch.Tensor, exact: torch.Tensor) -> float:
    """|y - exact| / |exact|; infinite where y is not finite."""
    found = float((y.double() - exact).norm() / exact.norm())
    return found if math.isfinite(found) else math.inf


def check(
    kind: Kind, n: int, k: int, rows: Sequence[int], target: str, open_session: Opened, seed: int = 0
) -> Iterator[Checked]:
    """The layer for each number of rows against y = x @ W.T in float64."""
    weights = kind.random(n, k, seed)
    session = open_session(compiled([kind.packed(weights)], target))
    (x_name,) = (port.name for port in session.executable.inputs)
    dense = kind.dense(weights.to(session.device)).double()
    for m in rows:
        x = rows_of(m, k, session.device, seed + m)
        (y,) = session({x_name: x}).values()
        (again,) = session({x_name: x}).values()
        yield Checked(kind.name, n, k, m, distance(y, x.double() @ dense.T), torch.equal(y, again))


@dataclass(frozen=True)
class Timed:
    """Microseconds of a contender; `error` says why there are none."""

    contender: str
    microseconds: float = 0.0
    error: str = ""


def ours(kind: Kind, weights: Weights, rows: Sequence[int], target: str, device: Device) -> dict[int, Timed]:
    """qcompile's times by M."""
    n, k = weights.codes.shape
    model, open_session = compiled([kind.packed(weights)], target), opened(device)
    sessions = [open_session(model) for _ in range(copies(kind.size(n, k)))]
    (x_name,) = (port.name for port in sessions[0].executable.inputs)
    out = {}
    for m in rows:
        x = rows_of(m, k, device.torch, m)
        out[m] = Timed("qcompile", 1e6 * seconds(device, [session.again({x_name: x}) for session in sessions]))
    return out


def rival(which: Rival, kind: Kind, weights: Weights, rows: Sequence[int], device: Device) -> dict[int, Timed]:
    """A contender's times by M; the reason where it cannot be had, or computes something else."""
    n, k = weights.codes.shape
    size = 2 * n * k if which is CUBLAS else kind.size(n, k)
    try:
        layers = [which.make(kind.name, weights, device.torch) for _ in range(copies(size))]
        x = rows_of(4, k, device.torch, 4)
        far = distance(layers[0](x.bfloat16()), x.double() @ kind.dense(weights.to(device.torch)).double().T)
    except Exception as error:  # packages of others fail in any way
        return {m: Timed(which.name, error=reason(error)) for m in rows}
    # bf16 scales and results, and weights that torchao quantizes again, are further off than ours may be.
    if far > 0.1:
        return {m: Timed(which.name, error=f"computes something else: relative error {far:.2g}") for m in rows}
    return {m: _timed(which.name, layers, rows_of(m, k, device.torch, m).bfloat16(), device) for m in rows}


def _timed(
    name: str, layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, device: Device
) -> Timed:
    def call(layer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: layer(x)

    try:
        with torch.no_grad():
            return Timed(name, 1e6 * seconds(device, [call(layer) for layer in layers]))
    except Exception as error:  # as above; some cannot be recorded in a graph
        return Timed(name, error=reason(error))


@dataclass(frozen=True)
class Machine:
    """What the GPU does at best: bytes/s of memory read, and flop/s of cuBLAS in bf16, both measured."""

    name: str
    bandwidth: float
    dense: float

    def limit(self, kind: Kind, n: int, k: int, m: int) -> float:
        """The least microseconds: all bytes of w, x and y at the bandwidth, or all products at the dense rate."""
        moved = kind.size(n, k) + 2 * m * (n + k)
        return 1e6 * max(moved / self.bandwidth, 2 * m * n * k / self.dense)


def measured(device: Device) -> Machine:
    """This GPU's own limits."""
    array = torch.ones(2**30 // 4, device=device.torch)
    read = seconds(device, [array.sum])
    size = 8192
    a, b = (torch.randn(size, size, device=device.torch).bfloat16() for _ in range(2))
    a @ b
    product = seconds(device, [lambda: a @ b])
    return Machine(torch.cuda.get_device_name(device.torch), array.nbytes / read, 2 * size**3 / product)


def time_layer(
    which: Rival | None, kind: Kind, n: int, k: int, rows: Sequence[int], target: str, device: Device
) -> dict[int, Timed]:
    """A contender's times for one weight, by M; None is qcompile."""
    free()
    weights = kind.random(n, k)
    return ours(kind, weights, rows, target, device) if which is None else rival(which, kind, weights, rows, device)


def free() -> None:
    """Gives the memory of what is not used any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table_row(machine: Machine, kind: Kind, n: int, k: int, m: int, item: Timed, dense: float | None) -> dict[str, Any]:
    """A contender's time, the share of the limit that it reaches, and its ratio to cuBLAS in bf16, which takes `dense` us."""
    row: dict[str, Any] = {"kind": kind.name, "N": n, "K": k, "M": m, "contender": item.contender}
    if item.error:
        return row | {"skipped": item.error}
    limit = machine.limit(kind, n, k, m)
    row |= {"us": round(item.microseconds, 2), "limit_us": round(limit, 2)}
    row |= {"share_of_limit": round(limit / item.microseconds, 3)}
    return row | ({"times_bf16": round(dense / item.microseconds, 3)} if dense else {})
