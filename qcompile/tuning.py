"""`qcompile tune`: the schedules that a model's linear kernels could have, modelled or timed, and a table of the fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from qcompile.artifact import Artifact, Built, Call, Extent, KernelSpec
from qcompile.errors import ArtifactError, ConfigError, ToolchainError
from qcompile.lowering.triton import cost, templates, toolchain
from qcompile.lowering.triton.devices import device
from qcompile.lowering.triton.schedule import choose, using, watched
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.tables import Entry, Table
from qcompile.lowering.triton.tiles import Problem, Schedule, candidates
from qcompile.target import INTERPRET, Target, gpu_capability, gpu_names
from qcompile.target import target as target_of

if TYPE_CHECKING:
    import torch

    from qcompile.runtime.store import Contents

Given = Sequence["torch.Tensor | None"]

MOST = 12
"""Candidates of a problem that are timed: those that the cost model likes best."""


@dataclass(frozen=True)
class Task:
    """A kernel whose schedule is to be found: a call of it, and the problem that its text asks a schedule for."""

    kernel: str
    spec: KernelSpec
    call: Call
    problem: Problem


@dataclass(frozen=True)
class Row:
    """A schedule for a task: microseconds as modelled, and as measured (None: it was not). `chosen` without tuning."""

    task: Task
    schedule: Schedule
    modelled: float
    measured: float | None = None
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "kernel": self.task.kernel,
            **vars(self.task.problem),
            **vars(self.schedule),
            "modelled us": round(self.modelled, 2),
            "measured us": None if self.measured is None else round(self.measured, 2),
            "chosen": self.chosen,
        }


class Timer(Protocol):
    """What times kernels on a device, called `name`."""

    name: str

    def __call__(self, kernel: Built, dims: Sequence[int], extents: Sequence[Extent], given: Given) -> float:
        """Microseconds of one run, as `qcompile.runtime.timing.kernel_seconds`."""


def tasks(artifact: Artifact, code: Target) -> list[Task]:
    """The kernels of a model that have a schedule, one for each problem; ConfigError for a model with no CUDA kernels."""
    executable = artifact.executable
    if executable is None or target_of(artifact.target).family != "cuda":
        raise ConfigError(
            "only kernels for CUDA have schedules", where="tune", found=f"target {artifact.target}",
            expected="a model compiled for cuda",
        )  # fmt: skip
    calls: dict[str, Call] = {}
    for step in executable.steps:
        for variant in step.variants:
            for call in variant.calls:
                calls.setdefault(call.kernel, call)
    found: dict[Problem, Task] = {}
    for name, spec in executable.kernels.items():
        with watched() as chosen:
            templates.emit(spec, code)
        for problem, _ in chosen:
            found.setdefault(problem, Task(name, spec, calls[name], problem))
    return list(found.values())


def plan(task: Task, capability: int, most: int = MOST) -> list[Row]:
    """The candidates for a task, those with the least modelled time first; the one taken without tuning among them."""
    problem, gpu = task.problem, device(capability)
    default = choose(
        problem.kind, problem.n, problem.k, problem.m, problem.bits, capability,
        value=problem.value, group=problem.group, split_k=problem.split_k, streams=problem.streams,
    )  # fmt: skip
    rows = [
        Row(task, each, cost.microseconds(problem, each, gpu), chosen=each == default)
        for each in candidates(problem, gpu)
    ]
    rows.sort(key=lambda row: row.modelled)
    return rows[:most] + [row for row in rows[most:] if row.chosen]


def built(rows: Sequence[Row], code: Target) -> list[Built | None]:
    """The kernel of each row, None where Triton has none for its schedule."""
    sources = []
    for row in rows:
        with using(Table.of([Entry(code.capability, row.task.problem, row.schedule)])):
            sources.append(templates.emit(row.task.spec, code))
    try:
        return list(toolchain.compile_sources(sources, code))
    except ToolchainError:
        return [_one(source, code) for source in sources]


def _one(source: Source, code: Target) -> Built | None:
    try:
        return toolchain.compile_sources([source], code)[0]
    except ToolchainError:
        return None


def measure(
    rows: Sequence[Row],
    code: Target,
    timer: Timer,
    tensors: Mapping[str, torch.Tensor],
    progress: Callable[[str, str], None] | None = None,
) -> list[Row]:
    """The rows with their measured times; a schedule that Triton has no kernel for, or that the GPU cannot start, has none."""
    out = []
    for row, kernel in zip(rows, built(rows, code), strict=True):
        if progress is not None:
            progress("time", f"{row.task.kernel}, {row.schedule}")
        if kernel is not None:
            # Decoding is mostly of one row, whatever its bucket takes.
            dims = (1 if row.task.problem.m <= 4 else row.task.problem.m,)
            given = [tensors.get(view.buffer) for view in row.task.call.args]
            with contextlib.suppress(ArtifactError):
                row = replace(row, measured=timer(kernel, dims, templates.extents(row.task.spec)(dims, 1), given))
        out.append(row)
    return out


def best(rows: Iterable[Row], capability: int, gpu: str) -> Table:
    """The fastest measured schedule of each problem; of equals the one that the model likes better."""
    found: dict[Problem, Row] = {}
    for row in rows:
        if row.measured is None:
            continue
        known = found.get(row.task.problem)
        if known is None or known.measured is None or row.measured < known.measured:
            found[row.task.problem] = row
    return Table.of(
        Entry(capability, problem, row.schedule, round(row.measured or 0.0, 2), gpu) for problem, row in found.items()
    )


class GpuTimer:
    """Times kernels on this machine's GPU, whose code is `code`, over copies of their weights that are not in its cache."""

    def __init__(self, code: Target):
        import torch

        from qcompile.runtime.cuda import CudaDevice

        found = gpu_capability()
        if found != code.capability:
            raise ConfigError(
                "schedules are timed on the GPU that they are for", where="tune",
                found="no GPU" if found is None else f"capability {found / 10}", expected=code.name,
                remedy="--dry-run shows what the cost model says, without a GPU",
            )  # fmt: skip
        self.device = CudaDevice()
        self.name = torch.cuda.get_device_name(self.device.torch)

    def __call__(self, kernel: Built, dims: Sequence[int], extents: Sequence[Extent], given: Given) -> float:
        from qcompile.runtime.timing import kernel_seconds

        return 1e6 * kernel_seconds(self.device, kernel, dims, extents, given)


def code_of(name: str) -> Target:
    """The target called `name`, which must be one NVIDIA GPU: `GpuTimer` times no others."""
    code = target_of(name)
    if code.name not in gpu_names("cuda"):
        raise ConfigError(
            "schedules are for one GPU", where="target", found=name, expected=", ".join(gpu_names("cuda"))
        )
    return code


def layers(shapes: Sequence[tuple[int, int]], config: Any) -> list[Contents]:
    """What `compile` makes of a linear layer of each size (N, K) with random weights, under a quantization config.

    What is called with which parameters is the same for every GPU, so it is compiled for the one that needs no machine code.
    """
    import torch

    from qcompile.compiler import compile

    made = []
    for n, k in shapes:
        layer = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False))
        rows = {0: torch.export.Dim("m", min=1, max=1 << 16)}
        compiled = compile(
            layer, config, target=INTERPRET, example_inputs=(torch.randn(8, k),), dynamic_shapes=(rows,), strict=True
        )
        made.append(compiled.contents)
    return made


def tune(
    models: Sequence[Contents],
    code: Target,
    timer: Timer | None,
    most: int = MOST,
    progress: Callable[[str, str], None] | None = None,
    keep: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The candidates of every problem in `models`, timed where there is a timer; each problem once.

    `keep` is given those of a problem as soon as they are timed.
    """
    rows: list[Row] = []
    seen = set[Problem]()
    wanted = ((contents, task) for contents in models for task in tasks(contents.artifact, code))
    with toolchain.workers_kept():
        for contents, task in wanted:
            if task.problem in seen:
                continue
            seen.add(task.problem)
            planned = plan(task, code.capability, most)
            if timer is not None:
                planned = measure(planned, code, timer, contents.tensors, progress)
                keep(planned)
            rows += planned
    return rows


def show(rows: Sequence[Row]) -> str:
    """The rows as text, a problem after the other."""
    lines, last = [], None
    for row in rows:
        problem, schedule = row.task.problem, row.schedule
        if problem != last:
            group = f" in groups of {problem.group}" if problem.group else ""
            parts = f", K in {problem.split_k} parts" if problem.split_k > 1 else ""
            what = f"{problem.value}{problem.bits}{group}" + (f" x {problem.streams}" if problem.streams > 1 else "")
            lines.append(f"{problem.kind} N={problem.n} K={problem.k} M<={problem.m} {what}{parts}: {row.task.kernel}")
            last = problem
        tile = f"{schedule.block_n} x {schedule.block_m} x {schedule.block_k}"
        taken = "" if row.measured is None else f"  measured {row.measured:9.2f} us"
        chosen = "  chosen" if row.chosen else ""
        lines.append(
            f"    {tile:15} {schedule.warps} warps, {schedule.stages} stages  modelled {row.modelled:9.2f} us{taken}{chosen}"
        )
    return "\n".join(lines)
