"""The whole compiler on a page: capture, passes, lowering, kernels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qcompile.artifact import Artifact, Executable
from qcompile.backend import backend_for
from qcompile.capture import capture
from qcompile.errors import ConfigError, LoweringError
from qcompile.export import remember
from qcompile.graphjson import graph_of
from qcompile.lowering.lower import lower
from qcompile.lowering.triton.linear import compute_dtype
from qcompile.methods.index import parse_config
from qcompile.passes.base import Context, run_pipeline
from qcompile.passes.pipelines import CHECKED, FULL, make, pipeline
from qcompile.planning import BYTES_AT_WORK, check
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.cache import build_kernels
from qcompile.runtime.codes import build_codes
from qcompile.runtime.cuda_session import waiting
from qcompile.runtime.model import CompiledModel
from qcompile.runtime.store import Contents
from qcompile.safetensors_folder import unmap
from qcompile.staging import Spilled, Stage, give_back_freed_memory
from qcompile.target import Target
from qcompile.target import target as target_of

if TYPE_CHECKING:
    from qcompile.artifact import Built
    from qcompile.program import Program
    from qcompile.report import Report

Accuracy = Literal["exact", "int8"]


def compile(
    model: Any,
    config: Any = None,
    *,
    target: str | Target | Sequence[str] = "cpu",
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    accuracy: Accuracy = "exact",
    strict: bool = False,
    threads: int | None = None,
    work: str | os.PathLike[str] | None = None,
    max_memory: int | None = None,
    spill: str | os.PathLike[str] | None = None,
    schedules: str | os.PathLike[str] | None = None,
    fuel: int | None = None,
    print_after: Collection[str] = (),
    show: Callable[[str, str], None] | None = None,
    progress: Callable[[str, str], None] | None = None,
) -> CompiledModel:
    """Compile `model` under the quantization `config` for `target`.

    `model` is an nn.Module (with `example_inputs` and `dynamic_shapes` as for torch.export), a transformers model, a folder
    with config.json and safetensors, the id of one on the Hub, or a .gguf file. `config` is a transformers config, its dict
    or JSON, one of ours, or None for what the checkpoint says (nothing, for a float model). A .gguf file keeps its own blocks
    unless another method is asked for; then its dequantized weights are quantized again.

    `target` is a CPU level, "reference", or GPUs by their capabilities: "cuda:sm_80,sm_90" makes one artifact with machine
    code for both and PTX for newer ones, "rocm:gfx942" is for AMD's, on any machine (see `qcompile.target`).
    `accuracy` is about weight-only formats on a CPU: "exact" computes with float32 activations, "int8" rounds the inputs of
    quantized linears to int8 in groups first. `strict` makes an operation without a kernel a LoweringError instead of a line
    in the report. `threads` is how many processors a CPU target uses when it runs here (None: all that the process may use).
    `work` is a folder that holds what is made of float weights: a compile that was interrupted and is started again with it
    goes on where it stopped. `max_memory` bounds the bytes of tensors that are in memory at a time, on top of the process
    itself (about 0.5 GB): large tensors lie in files of the folder `spill` (the system's temporary one without it), which
    nobody else sees and which go with the model; ConfigError when a single weight needs more.
    `schedules` is a table that `qcompile tune` wrote, for GPUs (None: the user's own, where there is one).
    `show(pass, text)` gets the graph's text after the passes named in `print_after` ("*" is all) that changed it;
    `progress(stage, on)` hears what is being worked on; `fuel` bounds the number of rewrites, to find one that is wrong.

    Errors: ConfigError, CheckpointError, CaptureError, LoweringError, ToolchainError; see `qcompile.errors`.
    """
    place = target_of(target)
    _check_arguments(place, accuracy, strict, schedules, print_after)
    if isinstance(model, str | os.PathLike) and progress is not None:
        progress("capture", str(model))
    if max_memory is not None:
        give_back_freed_memory()
    program = capture(model, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    report = program.report
    report.target, report.accuracy = place.name, accuracy
    if accuracy == "int8" and place.backend != "cpu":
        report.note(f"accuracy 'int8' is for CPUs: on {place.name} linears compute exactly")
    chosen = parse_config(config, program.quantization_config, program.source, program.model_config)
    method, parsed = chosen or (None, None)
    ctx = Context(
        report,
        backend_for(place, accuracy, compute_dtype(program)),
        method,
        parsed,
        fuel,
        frozenset("*"),
        show=_only(print_after, show),
        progress=progress,
        stage=None if work is None else Stage(Path(work)),
    )
    check(program, ctx)
    if max_memory is not None:
        _spill(program, max_memory, spill)
    run_pipeline(program, pipeline(CHECKED if place.backend == "reference" else FULL), ctx)
    if method is not None and program.quantization_config is None and fuel is None:
        _has_effect(report)
    checkpoint, lost = remember(program)
    tensors, executable, kernels = program.tensors | lost, None, dict[str, "Built"]()
    bounds: Bounds | None = None
    if place.backend != "reference":
        executable, weights = lower(program, place, accuracy, strict=strict)
        tensors |= weights
        if place.backend == "cuda" and (found := waiting(executable)):
            report.note(f"decode steps are launched call by call, not as one CUDA graph: {', '.join(found)} waits")
        kernels, bounds = _build(executable, place, progress, schedules, report)
    else:
        for path in report.weights:
            report.update_weight(path, tier="eager")
    artifact = Artifact(
        target=place.name,
        kind=program.kind,
        accuracy=accuracy,
        executable=executable,
        graph=_graph(program, executable),
        sizes=program.sizes,
        weights=program.weights,
        mixtures=program.mixtures,
        model_config=program.model_config,
        quantization_config=parsed.to_dict() if parsed is not None else None,
        generation=_generation(program.model_config),
        defaults=_defaults(program),
        checkpoint=checkpoint,
    )
    return CompiledModel(
        Contents(artifact, tensors, kernels, {}, report.to_json(), ctx.snapshots),
        on=place,
        threads=threads,
        bounds=bounds,
    )


def _check_arguments(
    place: Target, accuracy: str, strict: bool, schedules: object, print_after: Collection[str]
) -> None:
    """ConfigError for arguments that are wrong whatever the model is."""
    if schedules is not None and place.backend != "cuda":
        raise ConfigError("only kernels for CUDA have schedules", where="schedules", found=f"target {place.name}")
    if accuracy not in ("exact", "int8"):
        raise ConfigError("no such accuracy", where="accuracy", found=repr(accuracy), expected="'exact' or 'int8'")
    if strict and accuracy == "int8" and place.backend != "cpu":
        raise ConfigError(
            "this target computes exactly", where="accuracy", found="'int8'", expected=f"'exact' for {place.name}"
        )
    for name in print_after:
        if name != "*":
            make(name)


def _spill(program: Program, max_memory: int, folder: str | os.PathLike[str] | None) -> None:
    """Keeps the program's large tensors in files from now on; ConfigError when its largest weight does not fit."""
    most = max((module.n * module.k for module in program.modules.values()), default=0) * BYTES_AT_WORK
    if max_memory < most:
        raise ConfigError(
            "the largest weight does not fit in the memory allowed",
            where="max_memory",
            found=f"{max_memory} bytes",
            expected=f"{most} bytes or more",
            remedy="allow more: a weight is quantized and laid out as a whole",
        )
    program.tensors = Spilled(Path(tempfile.gettempdir() if folder is None else folder), program.tensors)
    unmap(program.source)


def _has_effect(report: Report) -> None:
    """ConfigError when a config that the caller gave quantizes nothing."""
    rows = report.weights.values()
    if all(row.method == "none" for row in rows):
        reasons = sorted({row.reason for row in rows})
        raise ConfigError(
            f"the {report.method} config quantizes no layer of this model",
            found="; ".join(reasons[:4]) or "no layer with a weight",
            expected="a layer that the method converts",
            remedy="choose another method, or take the config out",
        )


def _only(names: Collection[str], show: Callable[[str, str], None] | None) -> Callable[[str, str], None] | None:
    """`show` for the passes called `names`."""
    if show is None:
        return None
    return lambda name, text: show(name, text) if "*" in names or name in names else None


def _build(
    executable: Executable,
    place: Target,
    progress: Callable[[str, str], None] | None,
    schedules: str | os.PathLike[str] | None,
    report: Report,
) -> tuple[dict[str, Built], Bounds]:
    from qcompile.lowering.builders import builder_for

    builder = builder_for(place, progress, None if schedules is None else Path(schedules))
    bounds = Bounds.of(executable.kernels, builder, ours=True)
    if place.backend == "cuda":
        from qcompile.lowering.triton.describe import kernel_rows, launch_rows

        kernels = build_codes(executable.kernels, place.codes(), builder)
        report.kernels = kernel_rows(executable.kernels, kernels, place.codes(), builder)
        report.launches = launch_rows(executable)
        return kernels, bounds
    wanted = {name: (spec, place.name) for name, spec in executable.kernels.items()}
    return build_kernels(wanted, builder), bounds


def _graph(program: Program, executable: Executable | None) -> Any:
    """The graph as data, which any torch device can run; without one the artifact runs on its own target only."""
    try:
        return graph_of(program)
    except LoweringError as error:
        if executable is None:
            raise
        program.report.note(f"no reference graph: {error.summary} ({error.where})")
        return None


def _defaults(program: Program) -> dict[str, Any]:
    """What an input is filled with when a caller leaves it out, as transformers' encoders do."""
    usual = {"attention_mask": 1, "token_type_ids": 0}
    known = {item.name for item in program.inputs}
    return {name: value for name, value in usual.items() if name in known and program.model_config}


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}
