"""The machine code of linear kernels over fragments stays within the budgets beside their schedules; nothing is run."""

from __future__ import annotations

import re

import pytest

from qcompile.artifact import KernelSpec
from qcompile.formats.fragments import Fragments
from qcompile.formats.minifloat import E2M1
from qcompile.formats.tables import NF4
from qcompile.lowering.triton import sass, schedule, templates, tiles
from qcompile.lowering.triton.budgets import budget
from qcompile.lowering.triton.devices import device
from qcompile.lowering.triton.fragment_way import value_of
from qcompile.lowering.triton.linear import Shape
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.toolchain import SHARED, compile_sources
from qcompile.target import target

N = K = 4096
MOST = {"skinny": 16, "mid": 128, "large": 2048}
FORMATS = {
    "int2": Fragments(2, 128, zero="u8", scale="bf16"),
    "int3": Fragments(3, 128, zero="u8", scale="bf16"),
    "int4": Fragments(4, 128, zero="u8", scale="bf16"),
    "int8": Fragments(8, K, zero=128.0, scale="f32"),
    "nf4": Fragments(4, 64, NF4, scale="f32"),
    "mxfp4": Fragments(4, 32, E2M1, scale="f8e8m0"),
    "nvfp4": Fragments(4, 16, E2M1, scale="f8e4m3", tensor=True),
    "fp8": Fragments(8, 128, scale="f32", code="f8e4m3"),
}
DAILY = [
    ("skinny", "int4", 90),
    ("skinny", "nvfp4", 90),
    ("skinny", "fp8", 90),
    ("mid", "int4", 90),
    ("mid", "nf4", 80),
]
CAPABILITIES = (80, 90, 100, 120)
ALL = [(kind, format, capability) for capability in CAPABILITIES for kind in MOST for format in FORMATS]
FULL = [case for case in ALL if case not in DAILY]


@pytest.mark.parametrize(
    ("kind", "format", "capability"), [*DAILY, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)]
)
def test_the_main_loop_is_within_its_budget(kind: str, format: str, capability: int) -> None:
    shape = Shape((FORMATS[format].to_json(),), (N,), K, x="bf16")
    _check(shape, MOST[kind], kind, FORMATS[format], capability)


def test_a_row_and_its_norm_are_within_the_budget() -> None:
    shape = Shape((FORMATS["int4"].to_json(),), (N,), K, prologue={"op": "rms_norm", "eps": 1e-5})
    _check(shape, 1, "skinny", FORMATS["int4"], 90)


def _check(shape: Shape, most: int, kind: str, format: Fragments, capability: int) -> None:
    code = target(f"cuda:sm_{capability}")
    bounds = budget(kind, value_of(format), format.bits, capability, format.group)
    with schedule.watched() as chosen:
        source = templates.emit(KernelSpec("linear-fragments", shape.params(most=most, split_k=1)), code)
    (made,) = compile_sources([source], code)
    assert made.launch is not None and made.launch.spills == 0 and made.launch.shared <= SHARED[capability]
    ((problem, tile),) = chosen
    reckoned, slack = (reckon(problem, tile, device(capability)) for reckon in (tiles.shared_bytes, tiles.slack))
    sums = 4 * tile.block_n * tile.block_m
    assert made.launch.shared <= reckoned <= max(made.launch.shared + slack, sums), problem
    found = sass.profile(made.object)
    assert found.code.spills == 0 and found.main.tensor_cores and bounds is not None
    spent = found.main.instructions / _weights(source)
    assert max(found.main.loads) >= bounds.load_bits
    assert spent <= bounds.instructions, f"{spent:.2f} {found.main.counts()}"


def _weights(source: Source) -> float:
    """The weights of a thread in one step, from the text that says the tile."""
    match = re.search(r"Tiles of (\d+) outputs x \d+ rows, (\d+) inputs a step", source.text)
    assert match is not None
    return int(match[1]) * int(match[2]) / (32 * source.warps)
