"""Rows of the report about a program's kernels for GPUs: their schedules and machine code, and how many a layer starts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import import_module

from qcompile.artifact import Built, Executable, KernelSpec, Variant
from qcompile.dims import evaluate, names
from qcompile.lowering.triton.build import Builder
from qcompile.lowering.triton.templates import TEMPLATES
from qcompile.report import KernelRow, LaunchRow
from qcompile.runtime import cache
from qcompile.runtime.codes import coded
from qcompile.target import Target

_LAYER = re.compile(r"((?:.*?\.)?)(\d+)(?:\.|$)")


def kernel_rows(
    specs: Mapping[str, KernelSpec], kernels: Mapping[str, Built], codes: Iterable[Target], builder: cache.Builder
) -> list[KernelRow]:
    """A row for each kernel in each machine code, those that GPUs translate themselves left out; `kernels` by `coded` names."""
    assert isinstance(builder, Builder)
    return [
        _row(name, spec, kernels[coded(name, code)], code, builder)
        for name, spec in sorted(specs.items())
        for code in codes
        if not code.portable and 0 not in code.capabilities
    ]


def _row(name: str, spec: KernelSpec, kernel: Built, code: Target, builder: Builder) -> KernelRow:
    launch = kernel.launch
    assert launch is not None
    chosen = [schedule for _, schedule in builder.schedules_of(spec, code.name)]
    tile = (chosen[0].block_n, chosen[0].block_m, chosen[0].block_k) if chosen else ()
    each = launch.loop * tile[1] / launch.products if tile and launch.products else 0.0
    tier: str = getattr(import_module(f"qcompile.lowering.triton.{TEMPLATES[spec.template]}"), "TIER", "")
    return KernelRow(
        name, code.code, tier, tile, launch.warps, launch.stages,
        launch.registers, launch.spills, launch.shared, round(each, 2),
    )  # fmt: skip


def launch_rows(program: Executable) -> list[LaunchRow]:
    """What one token of one sequence starts in the layers of a program, the repeated ones together."""
    kernels, aten = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for step in program.steps:
        match = _LAYER.match(step.module)
        if match is None:
            continue
        for call in _taken(step.variants).calls:
            (kernels if call.kernel in program.kernels else aten)[match[1], match[2]] += 1
    layers: dict[str, set[str]] = {}
    for stem, number in (*kernels, *aten):
        layers.setdefault(stem, set()).add(number)
    return [
        LaunchRow(
            f"{stem}*",
            len(numbers),
            max(kernels[stem, each] for each in numbers),
            max(aten[stem, each] for each in numbers),
        )
        for stem, numbers in layers.items()
    ]


def _taken(variants: tuple[Variant, ...]) -> Variant:
    """The variant that runs where every size is 1."""
    for variant in variants:
        if (
            variant.when is None
            or evaluate(variant.when[0], dict.fromkeys(names(variant.when[0]), 1)) <= variant.when[1]
        ):
            return variant
    return Variant(None, ())
